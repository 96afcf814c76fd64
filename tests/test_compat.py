"""fastgpt.accelerate and restore on models of torch.nn parts, of nanoGPT's kind, and of transformers with random weights."""

import copy
import functools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

import fastgpt
from fastgpt import nn
from fastgpt.compat import parts
from fastgpt.nn import fallback

pytestmark = pytest.mark.usefixtures("whatever_size")
SEEDS = 8


class LayerNorm(torch.nn.Module):
    """nanoGPT's, with an optional bias."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(width))
        self.bias = torch.nn.Parameter(torch.rand(width)) if bias else None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(input, self.weight.shape, self.weight, self.bias, self.eps())

    def eps(self) -> float:
        return 1e-5


class NewGELU(torch.nn.Module):
    """minGPT's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class CausalSelfAttention(torch.nn.Module):
    """nanoGPT's and minGPT's parts; the mask written out, as minGPT does."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.c_attn, self.c_proj = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.attn_dropout, self.resid_dropout = torch.nn.Dropout(dropout), torch.nn.Dropout(dropout)
        self.register_buffer("bias", torch.ones(64, 64).tril().view(1, 1, 64, 64))
        self.n_head, self.scale = heads, (width // heads) ** -0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = (p.view(B, T, self.n_head, -1).transpose(1, 2) for p in self.c_attn(x).split(C, dim=2))
        att = (q @ k.transpose(-2, -1) * self.scale).masked_fill(self.bias[:, :, :T, :T] == 0, -math.inf)
        y = self.attn_dropout(att.softmax(-1)) @ v
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class Kin(torch.nn.Module):
    """A small model of these parts and torch's."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.wte = torch.nn.Embedding(50, 32)
        self.parts = torch.nn.Sequential(
            LayerNorm(32, bias=True),
            CausalSelfAttention(32, 4, dropout),
            torch.nn.RMSNorm(32, eps=1e-5),
            torch.nn.Linear(32, 64),
            NewGELU(),
            torch.nn.Linear(64, 32),
            torch.nn.GELU(),
            torch.nn.LayerNorm(32),
            torch.nn.Dropout(dropout),
        )
        self.head = torch.nn.Linear(32, 50, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        return self.head(self.parts(self.wte(idx)))


def gradients(model: torch.nn.Module, idx: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits and gradients in float64."""
    model.zero_grad()
    logits = model(idx)
    logits = getattr(logits, "logits", logits)
    F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), idx[:, 1:].flatten()).backward()
    found = {"logits": logits} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach().double().clone() for name, value in found.items()}


def assert_as_close_as_before(build, *, autocast: bool = False):
    """After accelerate the error against float64 is at most twice what it was before; the last model, its input and the report.

    The error is the root mean square over SEEDS models: one small gradient in bf16 has few roundings in it, and the ratio of
    two such sums from a single draw reached 2.03 where 16 draws together gave 0.92.
    """
    errors: dict[str, list[float]] = {}
    for seed in range(SEEDS):
        model, idx = build(seed)
        exact = gradients(copy.deepcopy(model).double(), idx)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            before = gradients(model, idx)
            report = fastgpt.accelerate(model)
            after = gradients(model, idx)
        assert before.keys() == after.keys() == exact.keys()
        scale = max(value.norm() for name, value in exact.items() if name != "logits")
        for name, want in exact.items():
            size = want.norm() if name == "logits" else scale
            sums = errors.setdefault(name, [0.0, 0.0])
            for i, run in enumerate((after, before)):
                sums[i] += float((run[name] - want).norm() / size) ** 2 / SEEDS
    for name, (ours, torchs) in errors.items():
        limit = 2 * torchs**0.5 + torch.finfo(torch.float32).eps
        assert ours**0.5 <= limit, f"{name}: {ours**0.5:.2e}, before {torchs**0.5:.2e}"
    return model, idx, report


def kin(seed: int = 0, **options) -> tuple[Kin, torch.Tensor]:
    torch.manual_seed(seed)
    return Kin(**options), torch.randint(50, (3, 17))


@pytest.mark.parametrize("autocast", [False, True])
def test_numbers_stay_and_the_report_names_the_parts(autocast: bool) -> None:
    model, _, report = assert_as_close_as_before(kin, autocast=autocast)
    found = {"LayerNorm": 2, "CausalSelfAttention": 1, "RMSNorm": 1, "NewGELU": 1, "GELU": 1, "Linear": 5}
    assert report.replaced == found | {"Dropout": 3, "Embedding": 1}
    assert "replaced 1 x NewGELU" in str(report)
    assert isinstance(model.parts[7], torch.nn.LayerNorm)
    assert type(model.head) is nn.Linear
    assert isinstance(model.parts[0], LayerNorm)
    assert model.head.weight is model.wte.weight
    assert not fastgpt.accelerate(model).replaced


def test_weights_stay_where_they_are_and_restore_undoes_all() -> None:
    model, _ = kin()
    classes = [type(module) for module in model.modules()]
    weights = {name: p.data_ptr() for name, p in model.named_parameters()}
    fastgpt.accelerate(model)
    assert classes != [type(module) for module in model.modules()]
    assert weights == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert fastgpt.restore(model) == 15
    assert [type(module) for module in model.modules()] == classes


def test_our_ops_are_what_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, idx = kin()
    fastgpt.accelerate(model)
    model(idx)
    monkeypatch.setattr("fastgpt.compat.parts.scaled_dot_product_attention", None)
    with pytest.raises(TypeError):
        model(idx)
    fastgpt.restore(model)
    model(idx)


def test_dropout_keeps_its_masks_where_that_is_asked_for() -> None:
    model, idx = kin(dropout=0.5)
    torch.manual_seed(3)
    want = model(idx)
    report = fastgpt.accelerate(model, keep_dropout=True)
    assert "masks are to be torch's" in report.left["Dropout"]
    torch.manual_seed(3)
    torch.testing.assert_close(model(idx), want)
    assert not torch.equal(model.eval()(idx), want)


def test_dropout_drops_as_many_and_follows_torch_s_seed() -> None:
    model, _ = kin(dropout=0.5)
    dropout, attention = model.parts[8], model.parts[1]
    assert fastgpt.accelerate(model).replaced["Dropout"] == 3
    x = torch.ones(200, 200)
    torch.manual_seed(1)
    dropped = dropout(x)
    torch.manual_seed(1)
    assert torch.equal(dropout(x), dropped)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert abs(float(dropped.mean()) - 1) < 0.05  # five standard deviations are 0.025
    # Attention's weights, too: the mean over many masks is what evaluation computes.
    x = torch.randn(1, 5, 32).expand(4000, 5, 32)
    attention.resid_dropout.p = 0.0
    many = attention(x)
    exact = attention.eval()(x[:1])
    assert (many.var(0) > 1e-4).any()
    off = (many.mean(0) - exact[0]) / (many.std(0) / 4000**0.5 + 1e-6)
    assert off.abs().max() < 5.5  # standard deviations, of 160 numbers


def test_embeddings_make_their_gradient_in_our_op(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    ids = torch.randint(30, (4, 9))
    plain = torch.nn.Embedding(30, 8, padding_idx=3)
    ours = copy.deepcopy(plain)
    fastgpt.accelerate(ours)
    for module in (plain, ours):
        module(ids).square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad)
    assert not ours.weight.grad[3].any()
    with pytest.raises(IndexError):
        ours(ids + 30)
    with pytest.raises(RuntimeError):
        ours(ids.float())
    monkeypatch.setattr(parts.ops, "embedding", None)
    with pytest.raises(TypeError):
        ours(ids)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), plain(ids))
    ours.weight.requires_grad_(False)
    ours(ids)
    limited = torch.nn.Embedding(30, 8, max_norm=1.0)
    fastgpt.accelerate(limited)
    assert float(limited(ids).detach().norm(dim=-1).max()) < 1.01


def test_the_report_says_what_stays_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback, "_size_matters", True)
    model = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 8), torch.nn.Linear(1024, 512))
    report = fastgpt.accelerate(model)
    assert report.replaced == {"LayerNorm": 1, "Linear": 1}
    assert report.partly["LayerNorm"] == "torch's on the CPU below 16,384 numbers a call"
    assert report.partly["Linear"].startswith("torch's but for up to 8 float32 rows")
    assert report.left["Linear"] == "torch's is faster where the weight has less than 524,288 numbers"
    assert type(model[1]) is torch.nn.Linear
    assert type(model[2]) is nn.Linear
    assert str(report).splitlines() == [
        f"replaced 1 x LayerNorm ({report.partly['LayerNorm']})",
        f"replaced 1 x Linear ({report.partly['Linear']})",
        f"left Linear: {report.left['Linear']}",
    ]
    monkeypatch.setattr(fallback, "_size_matters", False)
    assert fastgpt.accelerate(model).replaced == {"Linear": 1}


def test_a_part_with_other_results_is_left_alone() -> None:
    class Other(LayerNorm):
        def eps(self) -> float:
            return 0.5

    Other.__name__ = "LayerNorm"
    model = torch.nn.Sequential(Other(8, bias=False), torch.nn.ReLU(), torch.nn.SiLU(inplace=True)).train()
    report = fastgpt.accelerate(model)
    assert not report.replaced
    assert report.left["LayerNorm"] == "its results are others"
    assert report.left["SiLU"] == "inplace=True"
    assert all(module.training for module in model.modules())


def test_few_numbers_are_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("ours")

    model, idx = kin()
    want = model(idx)
    fastgpt.accelerate(model)
    monkeypatch.setattr(fallback, "_size_matters", True)
    for name in ("layer_norm", "rms_norm"):
        monkeypatch.setattr(parts.ops, name, broken)
    torch.testing.assert_close(model(idx), want)
    for few in (x for x in model.parts if isinstance(x, torch.nn.LayerNorm | torch.nn.RMSNorm)):
        with fallback.whatever_size(), pytest.raises(RuntimeError, match="ours"):
            few(torch.zeros(3, 32))
    # The comparison that `accelerate` makes is of our op, however few its numbers.
    fastgpt.restore(model)
    assert fastgpt.accelerate(model).left["LayerNorm"] == "its results are others"


def test_copies_pickles_hooks_and_state() -> None:
    model, idx = kin()
    seen = []
    state = copy.deepcopy(model.state_dict())
    fastgpt.accelerate(model)
    want = model(idx)
    handle = model.parts[0].register_forward_hook(lambda *_: seen.append(1))
    copied = copy.deepcopy(model)
    assert torch.equal(copied(idx), want)
    assert seen == [1]
    handle.remove()
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(loaded(idx), want)
    assert type(loaded.parts[1]) is type(model.parts[1])
    assert fastgpt.restore(loaded) == 15
    assert type(loaded.parts[1]) is CausalSelfAttention
    assert model.state_dict().keys() == state.keys()
    model.load_state_dict(state)
    assert torch.equal(model(idx), want)


def test_compiles() -> None:
    model, idx = kin()
    fastgpt.accelerate(model)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(idx), model(idx))


def test_what_is_no_model_raises() -> None:
    with pytest.raises(TypeError, match=r"model: got dict; accepted: a torch.nn.Module"):
        fastgpt.accelerate({})  # type: ignore[arg-type]
    assert str(fastgpt.accelerate(torch.nn.Flatten())) == "nothing that fastgpt knows"


FAMILIES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    | dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0),
    "gpt_neox": {"rotary_pct": 0.5, "hidden_act": "gelu"},
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 32},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
}


def hugging_face(family: str, seed: int = 0):
    transformers = pytest.importorskip("transformers")
    values = {"vocab_size": 50, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0} | FAMILIES[family]
    if family != "gpt2":
        values |= {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        }
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(family, **values)
    return transformers.AutoModelForCausalLM.from_config(config), torch.randint(50, (3, 17))


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_face_numbers_stay(family: str, autocast: bool) -> None:
    model, _, report = assert_as_close_as_before(functools.partial(hugging_face, family), autocast=autocast)
    assert report.replaced[f"attention of {family}"] >= 1
    assert report.replaced[f"loss of {type(model).__name__}"] == 1
    assert sum(report.replaced.values()) > 4
    fastgpt.restore(model)
    assert model.config._attn_implementation == "sdpa"
    assert not any("fastgpt" in type(module).__module__ for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_face_generates_the_same(family: str) -> None:
    """With a cache, in a batch, with left padding, beyond Mistral's window."""
    model, idx = hugging_face(family)
    model.eval()
    padded = torch.ones_like(idx)
    padded[0, :5] = 0
    for mask in (torch.ones_like(idx), padded):
        options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
        options |= {"output_scores": True, "return_dict_in_generate": True}
        before = model.generate(idx, **options)
        fastgpt.accelerate(model)
        after = model.generate(idx, **options)
        fastgpt.restore(model)
        torch.testing.assert_close(torch.stack(after.scores), torch.stack(before.scores), rtol=1e-3, atol=1e-4)
        assert torch.equal(after.sequences, before.sequences)


def test_registered_attention_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, idx = hugging_face("llama")
    want = model(idx).logits
    fastgpt.compat.hf.register()
    model.set_attn_implementation("fastgpt")
    torch.testing.assert_close(model(idx).logits, want)
    monkeypatch.setattr("fastgpt.compat.hf.ops", None)
    with pytest.raises(AttributeError):
        model(idx)
    mask = torch.ones_like(idx)
    mask[0, :5] = 0
    model(idx, attention_mask=mask)  # a mask is transformers' sdpa's


def test_an_attention_that_the_user_chose_stays() -> None:
    model, _ = hugging_face("llama")
    model.set_attn_implementation("eager")
    report = fastgpt.accelerate(model)
    assert "attention of llama" in report.left
    assert model.config._attn_implementation == "eager"


def test_hugging_face_state_copies_and_pickles(tmp_path) -> None:
    model, idx = hugging_face("llama")
    fastgpt.accelerate(model)
    want = model(idx).logits
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(idx).logits, want)
        fastgpt.restore(copied)
        torch.testing.assert_close(copied(idx).logits, want)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(type(model).from_pretrained(tmp_path)(idx).logits, want)
