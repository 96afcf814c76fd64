"""Models of transformers in their users' loops after `fastgpt.accelerate`: gradient checkpointing, torch.compile, autocast, evaluation,
attentions asked for, and two processes under DistributedDataParallel."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_compat import FAMILIES, assert_as_close_as_before, hugging_face

import fastgpt
from fastgpt.compat import hf
from fastgpt.compat.masks import is_causal_only

pytestmark = pytest.mark.usefixtures("whatever_size")


def step(model: Any, idx: torch.Tensor) -> list[torch.Tensor]:
    """The loss and the gradients."""
    model.zero_grad()
    loss = model(idx, labels=idx).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing(family: str) -> None:
    model, idx = hugging_face(family)
    model.train()
    want = step(model, idx)
    fastgpt.accelerate(model)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        torch.testing.assert_close(step(model, idx), want, rtol=1e-3, atol=1e-5)


def test_masks_that_say_causal() -> None:
    """transformers 4.5x makes them for training without a cache: they do not keep a layer from our op; others do."""
    causal = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    assert is_causal_only(causal, 6)
    assert is_causal_only(causal, 6)  # from memory
    causal[1, 0, 5, 2] = False
    assert not is_causal_only(causal, 6)
    causal[1, 0, 5, 2] = True
    assert is_causal_only(causal, 6)
    for other in (None, torch.ones(2, 1, 6, 6), causal.float(), causal[:, 0], causal[..., :5], ~causal):
        assert not is_causal_only(other, 6)

    model, idx = hugging_face("llama")
    want = model(idx).logits
    fastgpt.accelerate(model)
    seen: list[bool] = []
    ours = hf.ops.attention
    mask = torch.ones(17, 17, dtype=torch.bool).tril().expand(3, 1, 17, 17)
    padded = mask.clone()
    padded[0, :, :, :3] = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf.ops, "attention", lambda *a, **k: seen.append(k["is_causal"]) or ours(*a, **k))
        torch.testing.assert_close(model(idx, attention_mask=mask).logits, want)
        assert seen == [True, True]
        model(idx, attention_mask=padded)
        assert len(seen) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_modes_copies_and_the_compiler(family: str) -> None:
    model, idx = hugging_face(family)
    model.eval()
    with torch.no_grad():
        want = model(idx).logits
        fastgpt.accelerate(model)
        torch.testing.assert_close(model(idx).logits, want, rtol=1e-4, atol=1e-5)
        loaded = copy.deepcopy(model)
        loaded.load_state_dict(model.state_dict())
        assert torch.equal(loaded(idx).logits, model(idx).logits)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(idx).logits.detach(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_attentions_that_are_asked_for_come_from_the_original(family: str) -> None:
    model, idx = hugging_face(family)
    model.eval()
    model.set_attn_implementation("eager")
    want = model(idx, output_attentions=True)
    fastgpt.accelerate(model)
    got = model(idx, output_attentions=True)
    torch.testing.assert_close(got.attentions, want.attentions)
    torch.testing.assert_close(got.logits, want.logits)


LORA = {
    "gpt2": ["c_attn", "c_fc"],
    "gpt_neox": ["query_key_value", "dense_h_to_4h"],
    "llama": ["q_proj", "gate_proj", "down_proj"],
    "mistral": ["v_proj", "up_proj"],
    "qwen2": ["k_proj", "gate_proj", "o_proj"],
    "qwen3": ["q_proj", "up_proj"],
}


@pytest.mark.parametrize("first", [False, True], ids=["on_top", "below"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lora(family: str, first: bool) -> None:
    """Adapters are put on an accelerated model, or the other way round: the same loss and gradients, those of the adapters only."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=LORA[family], init_lora_weights=False, fan_in_fan_out=family == "gpt2")
    model, idx = hugging_face(family)
    other = copy.deepcopy(model)
    if first:
        fastgpt.accelerate(model)
    models = []
    for base in (model, other):
        torch.manual_seed(5)
        models.append(peft.get_peft_model(base, config).train())
    if not first:
        fastgpt.accelerate(models[0])
    ours, theirs = (step(adapted, idx) for adapted in models)
    assert len(ours) == 1 + 2 * 2 * len(LORA[family])
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert all(p.requires_grad == ("lora" in name) for name, p in models[0].named_parameters())
    merged = models[0].merge_and_unload().eval()
    torch.testing.assert_close(merged(idx).logits, models[1].eval()(idx).logits, rtol=1e-3, atol=1e-4)


WORKER = """
import sys
import torch
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from test_compat import FAMILIES, hugging_face
import fastgpt
from fastgpt.nn import fallback

dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=int(sys.argv[3]), world_size=2)
torch.set_num_threads(1)
rank, found = dist.get_rank(), {}
with fallback.whatever_size():
    for family in FAMILIES:
        model, idx = hugging_face(family)
        assert fastgpt.accelerate(model).replaced
        both = torch.nn.parallel.DistributedDataParallel(model)
        half = idx[:2][rank : rank + 1]
        both(half, labels=half).loss.backward()
        found[family] = [p.grad for p in model.parameters()]
if rank == 0:
    torch.save(found, sys.argv[4])
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    arguments = [sys.executable, "-P", "-c", WORKER, str(Path(__file__).parent), str(tmp_path / "meet")]
    environment = os.environ | {"PYTHONPATH": str(Path(fastgpt.__file__).parents[1])}
    runs = [
        subprocess.Popen([*arguments, str(rank), str(tmp_path / "grads")], env=environment, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for run in runs:
        _, err = run.communicate(timeout=180)
        assert run.returncode == 0, err.decode()[-2000:]
    found = torch.load(tmp_path / "grads")
    assert list(found) == list(FAMILIES)
    for family, got in found.items():
        model, idx = hugging_face(family)
        model(idx[:2], labels=idx[:2]).loss.backward()
        torch.testing.assert_close(got, [p.grad for p in model.parameters()], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_gpt2_of_124m(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2 as it is, with random weights: logits and every gradient as close to float64's as they were before."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("test_compat.SEEDS", 1)

    def build(seed: int) -> tuple[Any, torch.Tensor]:
        torch.manual_seed(seed)
        config = transformers.GPT2Config(**dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0))
        return transformers.GPT2LMHeadModel(config), torch.randint(config.vocab_size, (2, 48))

    model, _, report = assert_as_close_as_before(build, autocast=autocast)
    assert report.replaced["GPT2Block"] == 12
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


def test_dropout_of_blocks_under_checkpointing_and_the_compiler() -> None:
    """A block that is computed again drops the same; a compiled one drops, learns, and follows the seed."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))  # every dropout is 0.1
    idx = torch.randint(50, (3, 17))
    fastgpt.accelerate(model)
    model.train()

    def seeded(module: Any) -> list[torch.Tensor]:
        torch.manual_seed(4)
        return step(module, idx)

    want = seeded(model)
    assert not torch.equal(step(model, idx)[0], want[0])
    for reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        torch.testing.assert_close(seeded(model), want, rtol=1e-4, atol=1e-6)
    model.gradient_checkpointing_disable()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(seeded(compiled), seeded(compiled))
    assert not torch.equal(step(compiled, idx)[0], seeded(compiled)[0])
    assert all(float(gradient.abs().max()) > 0 for gradient in seeded(compiled)[1:])
