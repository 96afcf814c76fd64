"""Whole blocks of GPT-2 in transformers and of nanoGPT in one op: that they are, that numbers stay, and what is left to the parts."""

import contextlib
import copy
import functools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_compat import assert_as_close_as_before

import fastgpt
from fastgpt.benchmarks.nano_gpt import GPT as NanoGPT
from fastgpt.benchmarks.nano_gpt import NanoConfig
from fastgpt.compat import blocks, loss
from fastgpt.nn import fallback

pytestmark = pytest.mark.usefixtures("whatever_size")


def gpt2(seed: int = 0, **options: Any) -> tuple[Any, torch.Tensor]:
    """A small GPT-2 of transformers without dropout, and tokens."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    sizes |= {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(seed)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes | options)), torch.randint(50, (3, 17))


def nano(seed: int = 0, **options: Any) -> tuple[NanoGPT, torch.Tensor]:
    """A small nanoGPT, and tokens."""
    torch.manual_seed(seed)
    sizes = {"block_size": 32, "vocab_size": 50, "n_layer": 2, "n_head": 4, "n_embd": 32}
    return NanoGPT(NanoConfig(**sizes | options)), torch.randint(50, (3, 17))


class Logits(torch.nn.Module):
    """nanoGPT with the logits of every position."""

    def __init__(self, model: NanoGPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        return self.model(idx, idx)[0]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the ops that blocks call."""
    made: list[str] = []

    def watched(name: str, function: Any) -> Any:
        return lambda *args, **kwargs: made.append(name) or function(*args, **kwargs)

    monkeypatch.setattr(blocks, "transformer_block_with_qkv", watched("block", blocks.transformer_block_with_qkv))
    for name in ("transformer_block", "linear"):
        monkeypatch.setattr(blocks.ops, name, watched(name, getattr(blocks.ops, name)))
    return made


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("activation", ["gelu_new", "relu"])
def test_gpt2_blocks(calls: list[str], activation: str, autocast: bool) -> None:
    _, _, report = assert_as_close_as_before(functools.partial(gpt2_only, activation), autocast=autocast)
    assert report.replaced["GPT2Block"] == 2
    assert set(calls) == {"block"}


def gpt2_only(activation: str, seed: int) -> tuple[Any, torch.Tensor]:
    return gpt2(seed, activation_function=activation)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bias", [False, True])
def test_nano_blocks(calls: list[str], bias: bool, autocast: bool) -> None:
    def build(seed: int) -> tuple[Logits, torch.Tensor]:
        model, idx = nano(seed, bias=bias)
        return Logits(model), idx

    _, _, report = assert_as_close_as_before(build, autocast=autocast)
    assert report.replaced["Block"] == 2
    assert set(calls) == {"transformer_block"}


def test_generation_is_the_same_and_reads_the_weights_in_our_ops(calls: list[str]) -> None:
    model, idx = gpt2()
    padded = torch.ones_like(idx)
    padded[0, :5] = 0
    for mask in (torch.ones_like(idx), padded):
        options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        want = model.eval().generate(idx, **options)
        fastgpt.accelerate(model)
        calls.clear()
        assert torch.equal(model.generate(idx, **options), want)
        # A step is four products a block and the head; the prompt is a block's call, or with padding transformers' own.
        assert calls.count("linear") == 11 * (2 * 4 + 1) + 1
        assert calls.count("block") == (2 if mask is not padded else 0)
        fastgpt.restore(model)


def test_keys_and_values_of_a_training_step_are_there_but_give_no_gradient() -> None:
    model, idx = gpt2()
    want = model(idx).past_key_values
    fastgpt.accelerate(model)
    out = model(idx)
    for layer in range(2):
        torch.testing.assert_close(out.past_key_values.layers[layer].keys, want.layers[layer].keys)
        torch.testing.assert_close(out.past_key_values.layers[layer].values, want.layers[layer].values)
    with pytest.raises(RuntimeError, match="gradients through the cached keys"):
        out.past_key_values.layers[1].values.sum().backward()
    out.logits.sum().backward()


@pytest.mark.parametrize(
    "change",
    ["dropout", "hook", "mask", "eager", "scale", "checkpointing", "lora"],
)
def test_what_one_op_does_not_do_is_left_to_the_parts(change: str, calls: list[str]) -> None:
    model, idx = gpt2(
        resid_pdrop=0.5 if change == "dropout" else 0.0, scale_attn_by_inverse_layer_idx=change == "scale"
    )
    options: dict[str, Any] = {}
    seen = []
    if change == "eager":
        model.set_attn_implementation("eager")
    if change == "mask":
        options["attention_mask"] = torch.ones_like(idx)
        options["attention_mask"][0, :3] = 0
    if change == "hook":
        model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda *_: seen.append(1))
    if change == "checkpointing":
        model.gradient_checkpointing_enable()
    if change == "lora":
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
        model = peft.get_peft_model(model, config)

    def step() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        torch.manual_seed(1)
        model.zero_grad()
        out = model.train()(idx, labels=idx, **options)
        out.loss.backward()
        return out.loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    want_loss, want = step()
    report = fastgpt.accelerate(model, keep_dropout=True)
    got_loss, got = step()
    torch.testing.assert_close(got_loss, want_loss)
    assert want.keys() == got.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-3, atol=1e-5)
    taken = {"checkpointing": 4, "hook": 1, "scale": 1}  # of the two blocks; checkpointed ones run twice
    assert calls.count("block") == taken.get(change, 0)
    assert bool(seen) == (change == "hook")
    if change == "scale":
        assert "scaled by other" in report.left["GPT2Block"]


@pytest.mark.parametrize("kind", ["gpt2", "nano"])
def test_blocks_with_dropout(kind: str, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "gpt2":
        model, idx = gpt2(resid_pdrop=0.5, attn_pdrop=0.25, embd_pdrop=0.5)
        blocks_of, op, where = model.transformer.h, "transformer_block_with_qkv", blocks
    else:
        model, idx = nano(dropout=0.5)
        blocks_of, op, where = model.transformer.h, "transformer_block", blocks.ops
    given: list[tuple[float, float]] = []
    whole = getattr(where, op)
    monkeypatch.setattr(
        where, op, lambda *a, **k: given.append((k["attention_dropout"], k["dropout"])) or whole(*a, **k)
    )

    def loss_of(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        found = model(idx, labels=idx).loss if kind == "gpt2" else model(idx, idx)[1]
        assert isinstance(found, torch.Tensor)
        return found

    model.eval()
    exact = loss_of(0).item()
    model.train()
    with torch.no_grad():
        before = torch.stack([loss_of(seed) for seed in range(60)])
    fastgpt.accelerate(model)
    given.clear()  # nanoGPT's blocks were compared
    first = loss_of(1)
    first.backward()
    assert given == [(0.25 if kind == "gpt2" else 0.5, 0.5)] * 2
    assert torch.equal(loss_of(1), first)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        after = torch.stack([loss_of(seed) for seed in range(60)])
    # The losses of 60 masks: as far from evaluation's and as far apart as torch's masks make them.
    assert abs(after.mean() - before.mean()) < 5 * (after.var() / 60 + before.var() / 60).sqrt()
    assert 0.5 < after.std() / before.std() < 2
    given.clear()
    blocks_of[0].attn.resid_dropout.p = 0.1  # other than the MLP's: the parts
    loss_of(1)
    assert len(given) == 1
    model.eval()
    assert abs(loss_of(0).item() - exact) < 1e-5
    assert len(given) == 3
    assert given[1:] == [(0.0, 0.0)] * 2


def test_an_option_that_the_op_lacks_goes_to_the_block_below_and_is_logged_once(
    calls: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    fallback.log_fallback.cache_clear()
    model, _ = gpt2()
    fastgpt.accelerate(model)
    block, x = model.transformer.h[0].eval(), torch.randn(2, 5, 32)
    state = torch.randn(2, 3, 32)
    with caplog.at_level("WARNING", logger="fastgpt"):
        for _ in range(2):
            with pytest.raises(ValueError, match="cross-attention layers"):  # transformers' own
                block(x, encoder_hidden_states=state)
        block(x)
        with contextlib.suppress(TypeError):  # a name that transformers may have one day; 4.57's block takes it on, too
            block(x, another=state)
    assert [record.getMessage() for record in caplog.records] == [
        f"a block of GPT-2 with {name} is computed by torch: the fastgpt op does not support it"
        for name in ("encoder_hidden_states", "another")
    ]
    assert calls == ["block"]


def test_dropout_of_attention_in_a_block_by_parts() -> None:
    """A block with a hook: attention alone is ours, and still drops weights."""
    model, idx = gpt2(attn_pdrop=0.5)
    fastgpt.accelerate(model)
    for block in model.transformer.h:
        block.mlp.c_fc.register_forward_hook(lambda *_: None)
    model.train()

    def logits(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        found: torch.Tensor = model(idx).logits
        return found

    assert torch.equal(logits(1), logits(1))
    assert not torch.allclose(logits(1), logits(2), atol=1e-4)
    model.eval()
    assert torch.equal(logits(1), logits(2))


@pytest.mark.parametrize("kind", ["gpt2", "nano"])
def test_a_training_step_without_logits(kind: str) -> None:
    model, idx = gpt2() if kind == "gpt2" else nano()

    def step(**options: Any) -> tuple[Any, torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        if kind == "gpt2":
            labels = idx.clone()
            labels[0, :4] = -100
            out = model(idx, labels=labels, **options)
            found = out.logits, out.loss
        else:
            found = model(idx, torch.cat([idx[:, 1:], torch.full((3, 1), -1)], 1))
        found[1].backward()
        return *found, [p.grad.clone() for p in model.parameters()]

    _, want_loss, want = step()
    report = fastgpt.accelerate(model, fused_loss=True)
    assert report.replaced[type(model).__name__] == 1
    logits, got_loss, got = step()
    assert logits is None
    torch.testing.assert_close(got_loss, want_loss)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)
    if kind == "gpt2":
        assert step(logits_to_keep=0)[0].shape == (3, 17, 50)
        torch.testing.assert_close(step(num_items_in_batch=7)[1], want_loss * 45 / 7)
    model.eval()
    assert step()[0].shape == (3, 17, 50)
    restored = pickle.loads(pickle.dumps(model))
    fastgpt.restore(restored)
    assert not any("fastgpt.compat" in type(module).__module__ for module in restored.modules())


def test_the_loss_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, idx = gpt2()
    want = [model(idx, labels=idx).loss, model(idx, labels=idx, num_items_in_batch=torch.tensor(5)).loss]
    assert fastgpt.accelerate(model).replaced["loss of GPT2LMHeadModel"] == 1
    got = [model(idx, labels=idx).loss, model(idx, labels=idx, num_items_in_batch=torch.tensor(5)).loss]
    torch.testing.assert_close(got, want)
    monkeypatch.setattr(loss, "ops", None)
    with pytest.raises(AttributeError):
        model(idx, labels=idx)
    fastgpt.restore(model)
    model(idx, labels=idx)


def test_copies_and_compiled_models() -> None:
    for build in (gpt2, nano):
        model, idx = build()
        fastgpt.accelerate(model)

        def run(module: Any, idx: torch.Tensor = idx) -> torch.Tensor:
            out = module(idx, idx) if isinstance(model, NanoGPT) else (module(idx).logits,)  # noqa: B023
            return out[0]

        want = run(model)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(run(copied), want)
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(run(compiled), want)


def test_the_optimizer_of_nanogpt_is_fused_and_updates_the_same() -> None:
    models = [nano()[0] for _ in range(2)]
    _, idx = nano()
    report = fastgpt.accelerate(models[1])
    assert report.replaced["GPT"] == 1
    rates = {"weight_decay": 0.1, "learning_rate": 1e-2, "betas": (0.8, 0.95), "device_type": "cpu"}
    optimizers = [model.configure_optimizers(**rates) for model in models]
    assert not optimizers[0].defaults["fused"]
    assert all(group["fused"] for group in optimizers[1].param_groups)
    for model, optimizer in zip(models, optimizers, strict=True):
        for _ in range(5):
            optimizer.zero_grad(set_to_none=True)
            model(idx, idx)[1].backward()
            optimizer.step()
    for mine, theirs in zip(models[1].parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    want, got = (optimizer.state_dict() for optimizer in optimizers)
    for group in range(2):
        assert {**got["param_groups"][group], "fused": None} == want["param_groups"][group]
    optimizers[1].load_state_dict(want)  # an older checkpoint
    optimizers[1].step()
    chosen, _ = nano()
    chosen.__class__ = ChoosesItsOptimizer
    fastgpt.accelerate(chosen)
    assert chosen.configure_optimizers().param_groups[0]["foreach"] is True


class ChoosesItsOptimizer(NanoGPT):
    """A user's GPT, whose optimizer is to be as it says."""

    def configure_optimizers(self) -> torch.optim.AdamW:  # type: ignore[override]
        return torch.optim.AdamW(self.parameters(), foreach=True)


ChoosesItsOptimizer.__name__ = "GPT"


def test_a_block_of_the_same_name_that_is_another_is_left_alone() -> None:
    model, _ = nano()

    class Block(type(model.transformer.h[0])):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 2 * self.attn(self.ln_1(x))

    model.transformer.h[0].__class__ = Block
    report = fastgpt.accelerate(model)
    assert report.replaced["Block"] == 1
    assert "its results are others" in report.left["Block"]


def test_activations_are_told_apart() -> None:
    assert blocks.activation_of(torch.nn.GELU()) == "gelu"
    assert blocks.activation_of(torch.nn.GELU(approximate="tanh")) == "gelu_tanh"
    assert blocks.activation_of(torch.nn.ReLU()) == "relu"
    assert blocks.activation_of(torch.nn.Softplus()) is None
    assert F.gelu(torch.tensor(1.0)) != F.gelu(torch.tensor(1.0), approximate="tanh")
