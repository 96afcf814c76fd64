"""The model in Llama's configuration against the same architecture in plain torch; rotary scaling, gated activations, biases, heads."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from fastgpt.errors import UserError
from fastgpt.infer import KVCache
from fastgpt.model import GPT, GPTConfig, load_model, save_model
from fastgpt.model.rope import rope_scale

SHAPE = {"vocab_size": 97, "block_size": 48, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 64}
LLAMA = {"norm": "rms_norm", "norm_eps": 1e-6, "position": "rope", "activation": "swiglu", "bias": False}
LLAMA3 = {
    "type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_block_size": 32,
}


def turned(x: torch.Tensor, theta: float) -> torch.Tensor:
    """x (B, H, T, D) after its turn by complex numbers: x1 + i x2 times exp(i t f)."""
    D = x.shape[-1]
    frequencies = theta ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angles = torch.arange(x.shape[2], dtype=torch.float64)[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def plain(model: GPT, weights: dict[str, torch.Tensor], idx: torch.Tensor, targets: torch.Tensor):
    """Llama's formula in plain torch with the model's weights (of any dtype)."""
    c = model.config
    gate = {"swiglu": F.silu, "geglu": F.gelu, "geglu_tanh": lambda g: F.gelu(g, approximate="tanh")}[c.activation]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, (c.n_embd,), weights[f"{name}.weight"], c.norm_eps)

    B, T = idx.shape
    x = F.embedding(idx, weights["wte.weight"])
    for i in range(c.n_layer):
        h = f"h.{i}"
        qkv = linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").view(B, T, -1, c.head_dim).transpose(1, 2)
        q, k, v = qkv.split([c.n_head, c.kv_heads, c.kv_heads], dim=1)
        q, k = turned(q, c.rope_theta), turned(k, c.rope_theta)
        k, v = (part.repeat_interleave(c.n_head // c.kv_heads, dim=1) for part in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, -1)
        x = x + linear(y, f"{h}.attn.c_proj")
        g, up = linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc").chunk(2, dim=-1)
        x = x + linear(gate(g) * up, f"{h}.mlp.c_proj")
    logits = F.linear(norm(x, "ln_f"), weights["wte.weight" if c.tied_head else "lm_head.weight"])
    return logits, F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


def built(**changes) -> tuple[GPT, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE | LLAMA | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, torch.randint(97, (3, 48)), torch.randint(97, (3, 48))


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16 autocast"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"tied_head": False, "qkv_bias": True, "activation": "geglu"}, {"activation": "geglu_tanh", "bias": True}],
)
def test_parity_with_llama_in_plain_torch(changes: dict, autocast: bool) -> None:
    model, idx, targets = built(**changes, rope_theta=500.0)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def run(forward, leaves):
        logits, loss = forward()
        loss.backward()
        return {"logits": logits.detach().double()} | {name: leaf.grad.double() for name, leaf in leaves.items()}

    def run_plain(dtype):
        leaves = {name: w.to(dtype).clone().requires_grad_() for name, w in weights.items()}
        return run(lambda: plain(model, leaves, idx, targets), leaves)

    exact = run_plain(torch.float64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torchs = run_plain(torch.float32)
        ours = run(lambda: model(idx, targets), dict(model.named_parameters()))
    assert ours.keys() == exact.keys()
    for name, want in exact.items():
        error, torch_error = ((r[name] - want).norm() / want.norm() for r in (ours, torchs))
        assert error <= 2 * torch_error + torch.finfo(torch.float32).eps, (
            f"{name}: {error:.2e}, torch {torch_error:.2e}"
        )


def test_cached_positions_are_the_uncached_ones() -> None:
    model, idx, _ = built()
    model.eval()
    with torch.inference_mode():
        want = model(idx, all_logits=True)[0]
        cache = KVCache(model.config)
        got = torch.cat([model(part, cache=cache, all_logits=True)[0] for part in idx.split([20, 1, 27], dim=1)], 1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    model(idx, idx)[1].backward()  # the tables that inference used are no inference tensors


def test_attention_sees_distances_not_positions() -> None:
    model, _, _ = built()
    rotary = model.h[0].attn
    x = torch.randn(1, 8, 64)
    at = {start: rotary(x, None, model._turns(start, 8)) for start in (0, 17)}
    torch.testing.assert_close(at[0], at[17], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(at[0], rotary(x))


def test_llama3_scaling() -> None:
    config = GPTConfig(**SHAPE | LLAMA, rope_scaling=LLAMA3)
    scale = rope_scale(config)
    assert isinstance(scale, torch.Tensor)
    assert len({1.0, 1 / 8} & set(scale.tolist())) == 2 < len(set(scale.tolist()))  # every branch of the rule
    for i, got in enumerate(scale.tolist()):  # Meta's rule, a frequency at a time
        frequency = 10000.0 ** (-2 * i / config.head_dim)
        wavelength = 2 * math.pi / frequency
        if wavelength < 32 / 4.0:
            want = 1.0
        elif wavelength > 32 / 1.0:
            want = 1 / 8
        else:
            smooth = (32 / wavelength - 1.0) / (4.0 - 1.0)
            want = (1 - smooth) / 8 + smooth
        assert got == pytest.approx(want, rel=1e-12)
    assert rope_scale(GPTConfig(**SHAPE | LLAMA, rope_scaling={"type": "linear", "factor": 4.0})) == 0.25


def test_what_is_saved_loads_again(tmp_path) -> None:
    model, idx, targets = built(tied_head=False, rope_scaling=LLAMA3, norm_bias=False)
    save_model(model, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors")
    assert loaded.config == model.config
    for copied in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(idx, targets)[0], model(idx, targets)[0])


def test_half_precision_keeps_the_angles() -> None:
    model, idx, _ = built()
    cos, _ = model.bfloat16()._turns(40, 8)
    assert cos.dtype == torch.float32
    assert model(idx)[0].dtype == torch.bfloat16


def test_counts() -> None:
    model, _, _ = built(tied_head=False)
    block = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 192 + 2 * 64
    assert model.n_params() == model.n_params(positions=False) == 2 * 97 * 64 + 2 * block + 64
    assert model.flops_per_token(10) == 6 * (97 * 64 + 2 * (block - 128)) + 12 * 2 * 64 * 10


def test_compiles_in_one_graph() -> None:
    model, idx, _ = built()
    logits, loss = torch.compile(model, fullgraph=True, backend="aot_eager")(idx, idx)
    want_logits, want_loss = model(idx, idx)
    torch.testing.assert_close(logits, want_logits)
    torch.testing.assert_close(loss, want_loss)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "rmsnorm"}, "norm: got 'rmsnorm'; accepted: layer_norm, rms_norm; did you mean 'rms_norm'"),
        ({"position": "alibi"}, "position: got 'alibi'; accepted: learned, rope"),
        ({"norm_eps": 0}, "norm_eps: got 0; accepted: a number above 0"),
        ({"rope_theta": "1e4"}, "rope_theta: got '1e4'"),
        ({"tied_head": None}, "tied_head: got None; accepted: true or false"),
        ({"qkv_bias": 1}, "qkv_bias: got 1; accepted: true or false"),
        ({"norm_bias": True}, "norm_bias: got True; an rms_norm has no bias"),
        ({"n_hidden": 0}, "n_hidden: got 0; accepted: a whole number of at least 1"),
        ({"n_embd": 12, "n_head": 4}, "rope turns pairs"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling: got .*accepted: none, or a type of linear"),
        ({"rope_scaling": {"type": "linear"}}, r"type 'linear' takes \['factor', 'type'\]"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0; accepted: a number above 0"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor must be below high_freq_factor"),
        ({"rope_scaling": "linear"}, "rope_scaling: got 'linear'"),
        ({"position": "learned", "rope_scaling": LLAMA3}, "it needs rope"),
    ],
)
def test_a_value_that_does_not_fit_is_named(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        GPTConfig(**SHAPE | LLAMA | changes)
