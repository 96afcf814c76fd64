"""transformer_block: the block in one call against its formula and against its parts; what Block takes it for."""

import pytest
import torch
import torch.nn.functional as F
from parity import check_op, random
from torch.library import opcheck

from fastgpt import ops
from fastgpt.model import GPT, GPTConfig
from fastgpt.ops.reference.dropout import dropout_mask
from fastgpt.ops.transformer_block import transformer_block_with_qkv

ACTIVATIONS = ("relu", "sigmoid", "tanh", "gelu", "gelu_tanh", "silu")


def inputs(batch, time, width, heads, kv_heads, bias=True, dtype=torch.float32):
    """x and the twelve parameters, without the biases where `bias` is false."""
    qkv = width // heads * (heads + 2 * kv_heads)
    shapes = [(width,), (qkv, width), (width, width), (width,), (2 * width, width), (width, 2 * width)]
    tensors = [random(batch, time, width, dtype=dtype)]
    for i, shape in enumerate(shapes):
        weight = random(
            *shape, seed=2 * i + 1, dtype=torch.float64, scale=0.1 if len(shape) == 1 else shape[-1] ** -0.5
        )
        tensors.append((weight + 1 if len(shape) == 1 else weight).to(dtype))
        if bias:
            tensors.append(random(shape[0], seed=2 * i + 2, dtype=dtype, scale=0.1))
    return tensors


def twelve(params, bias):
    return list(params) if bias else [p for weight in params for p in (weight, None)]


def plain(x, params, heads, kv_heads, activation):
    """The block as one writes it in torch."""
    norm1, norm1_bias, qkv, qkv_bias, proj, proj_bias, norm2, norm2_bias, fc, fc_bias, out, out_bias = params
    width = x.shape[-1]
    act = {"gelu_tanh": lambda v: F.gelu(v, approximate="tanh")}.get(activation) or getattr(F, activation)
    rows = F.linear(F.layer_norm(x, (width,), norm1, norm1_bias), qkv, qkv_bias).unflatten(
        -1, (heads + 2 * kv_heads, -1)
    )
    q, k, v = (part.transpose(1, 2) for part in rows.split([heads, kv_heads, kv_heads], dim=2))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads).transpose(1, 2).flatten(2)
    x = x + F.linear(y, proj, proj_bias)
    return x + F.linear(act(F.linear(F.layer_norm(x, (width,), norm2, norm2_bias), fc, fc_bias)), out, out_bias)


def dropped(x, seed, p):
    return x * dropout_mask(x.shape, seed, p) / (1 - p)


def plain_dropped(x, params, heads, seeds, attention_p, p):
    """The block with its three dropouts, the masks those of `ops.dropout`."""
    norm1, norm1_bias, qkv, qkv_bias, proj, proj_bias, norm2, norm2_bias, fc, fc_bias, out, out_bias = params
    width, time = x.shape[-1], x.shape[1]
    rows = F.linear(F.layer_norm(x, (width,), norm1, norm1_bias), qkv, qkv_bias).unflatten(-1, (3, heads, -1))
    q, k, v = rows.permute(2, 0, 3, 1, 4)
    future = torch.ones(time, time, dtype=torch.bool).triu(1)
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(future, float("-inf")).softmax(-1)
    y = (dropped(weights, seeds[0], attention_p) @ v).transpose(1, 2).flatten(2)
    x = x + dropped(F.linear(y, proj, proj_bias), seeds[1], p)
    y = F.gelu(F.linear(F.layer_norm(x, (width,), norm2, norm2_bias), fc, fc_bias), approximate="tanh")
    return x + dropped(F.linear(y, out, out_bias), seeds[2], p)


def check(tensors, heads, kv_heads, activation, bias, what=""):
    def call(function, x, params, **options):
        return function(x, twelve(params, bias), **options)

    check_op(
        lambda x, *p: call(ops.transformer_block, x, p, n_head=heads, n_kv_head=kv_heads, activation=activation),
        lambda x, *p: call(plain, x, p, heads=heads, kv_heads=kv_heads, activation=activation),
        lambda x, *p: call(plain, x, p, heads=heads, kv_heads=kv_heads, activation=activation),
        tensors,
        what,
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 64, 2, 2), (2, 17, 24, 3, 1), (3, 70, 64, 4, 2)], ids=str)
def test_parity(isa, shape, bias):
    check(inputs(*shape, bias=bias), *shape[3:], "gelu", bias, f"{shape}")


SEEDS = torch.tensor([3, 2**62 + 5, 11])


@pytest.mark.parametrize(("attention_p", "p"), [(0.25, 0.5), (0.0, 0.1), (0.3, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout(isa, dtype, attention_p, p):
    options = {"seeds": SEEDS, "attention_dropout": attention_p, "dropout": p}
    plainly = lambda x, *w: plain_dropped(x, w, 4, SEEDS, attention_p, p)  # noqa: E731
    check_op(
        lambda x, *w: ops.transformer_block(x, w, n_head=4, **options),
        plainly,
        plainly,
        inputs(8, 21, 32, 4, 4, dtype=dtype),
        f"dropout {attention_p} and {p}",
    )


def test_dropout_follows_torch_s_seed_and_none_is_none():
    x, *params = inputs(2, 9, 16, 2, 2)

    def run(seed, **options):
        torch.manual_seed(seed)
        return ops.transformer_block(x, params, n_head=2, **options)

    first = run(1, dropout=0.5, attention_dropout=0.5)
    assert torch.equal(first, run(1, dropout=0.5, attention_dropout=0.5))
    assert not torch.equal(first, run(2, dropout=0.5, attention_dropout=0.5))
    assert torch.equal(run(1, seeds=SEEDS), run(2))
    with ops.use_backend("reference"):
        everything = run(1, dropout=1.0, attention_dropout=1.0)
    torch.testing.assert_close(run(1, dropout=1.0, attention_dropout=1.0), everything)
    torch.testing.assert_close(everything, x)
    drawn = torch.get_rng_state()
    run_state = ops.transformer_block(x, params, n_head=2)
    assert torch.equal(drawn, torch.get_rng_state())
    assert torch.equal(run_state, run(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transposed_weights_are_used_where_they_are(isa, dtype, monkeypatch):
    tensors = inputs(2, 19, 24, 3, 3, dtype=dtype)
    stored = [t.t().contiguous() if t.dim() == 2 else t for t in tensors]
    turned = lambda params: [p.t() if p.dim() == 2 else p for p in params]  # noqa: E731
    check_op(
        lambda x, *p: ops.transformer_block(x, turned(p), n_head=3),
        lambda x, *p: plain(x, turned(p), 3, 3, "gelu_tanh"),
        lambda x, *p: plain(x, turned(p), 3, 3, "gelu_tanh"),
        stored,
        "transposed",
    )
    x, *params = (t.clone().requires_grad_() for t in stored)
    monkeypatch.setattr(
        torch.Tensor, "contiguous", lambda self: self if self.is_contiguous() else pytest.fail("copied")
    )
    ops.transformer_block(x, turned(params), n_head=3).backward(torch.ones_like(x))
    assert all(p.grad.is_contiguous() for p in params)


def test_queries_keys_and_values_of_the_call():
    x, *params = inputs(2, 5, 16, 2, 1)
    y, qkv = transformer_block_with_qkv(x, params, n_head=2, n_kv_head=1)
    torch.testing.assert_close(y, ops.transformer_block(x, params, n_head=2, n_kv_head=1))
    torch.testing.assert_close(qkv, F.linear(F.layer_norm(x, (16,), params[0], params[1]), params[2], params[3]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    check(inputs(2, 20, 32, 4, 4), 4, 4, activation, True, activation)


def test_half_storage(isa):
    check(inputs(2, 40, 64, 4, 4, dtype=torch.bfloat16), 4, 4, "gelu", True, "bf16")


def test_formula_is_the_block_and_its_gradient():
    tensors = inputs(2, 5, 8, 2, 1, dtype=torch.float64)
    with ops.use_backend("reference"):
        leaves = [t.requires_grad_() for t in tensors]
        assert torch.autograd.gradcheck(
            lambda x, *p: ops.transformer_block(x, p, n_head=2, n_kv_head=1, activation="tanh"), leaves
        )
        options = {"seeds": SEEDS, "dropout": 0.3, "attention_dropout": 0.2}
        assert torch.autograd.gradcheck(
            lambda x, *p: ops.transformer_block(x, p, n_head=2, n_kv_head=1, activation="tanh", **options), leaves
        )


@pytest.mark.parametrize("medium", [False, True])
def test_autocast_and_medium_are_as_exact_as_torch_in_halves(isa, medium):
    tensors = inputs(2, 64, 64, 4, 4)
    exact = gradients(plain_block, [t.double() for t in tensors])
    with torch.autocast("cpu", torch.bfloat16):
        theirs = gradients(plain_block, tensors)
    torch.set_float32_matmul_precision("medium" if medium else "highest")
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=not medium):
            mine = gradients(lambda x, *p: ops.transformer_block(x, p, n_head=4), tensors)
    finally:
        torch.set_float32_matmul_precision("highest")
    for ours, torchs, truth in zip(mine, theirs, exact, strict=True):
        assert ours.dtype == torchs.dtype == torch.float32
        error, allowed = ((t.double() - truth).norm() / truth.norm() for t in (ours, torchs))
        assert error <= 2 * allowed


def plain_block(x, *params):
    return plain(x, params, 4, 4, "gelu_tanh")


def gradients(function, tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, random(*y.shape, seed=7).to(y.dtype))]


def test_same_bits_for_any_number_of_threads(isa):
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(gradients(lambda x, *p: ops.transformer_block(x, p, n_head=4), inputs(3, 50, 64, 4, 4)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_without_gradients_nothing_is_kept():
    x, *params = inputs(2, 30, 32, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(ops.transformer_block(x, params, n_head=4), plain_block(x, *params))
    frozen = ops.transformer_block(x.requires_grad_(), params, n_head=4)
    frozen.sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in params)


def test_opcheck():
    x, *params = (t.requires_grad_() for t in inputs(1, 6, 16, 2, 1))
    rest = (2, 1, 1e-5, "gelu", torch.float32, None, 0.0, 0.0, True)
    opcheck(torch.ops.fastgpt.transformer_block.default, (x, *params, *rest))
    opcheck(torch.ops.fastgpt.transformer_block.default, (x, *params, *rest[:5], SEEDS, 0.1, 0.2, True))
    turned = [p.detach().t().contiguous().t() if p.dim() == 2 else p.detach() for p in params]
    opcheck(torch.ops.fastgpt.transformer_block.default, (x.detach(), *turned, *rest))


def test_compile():
    x, *params = (t.requires_grad_() for t in inputs(1, 6, 16, 2, 2))
    function = lambda x, *p: ops.transformer_block(x * 2, p, n_head=2).square().sum()  # noqa: E731
    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(compiled(x, *params), function(x, *params))


def test_bad_input():
    x, *params = inputs(1, 6, 16, 2, 2)
    with pytest.raises(ValueError, match=r"params\[2\] has shape"):
        ops.transformer_block(x, params, n_head=2, n_kv_head=1)
    with pytest.raises(ValueError, match="heads"):
        ops.transformer_block(x, params, n_head=3)
    with pytest.raises(ValueError, match="activation"):
        ops.transformer_block(x, params, n_head=2, activation="gelo")
    for bad in ({"dropout": 1.5}, {"attention_dropout": -0.1}):
        with pytest.raises(ValueError, match="dropout is"):
            ops.transformer_block(x, params, n_head=2, **bad)
    with pytest.raises(ValueError, match=r"seeds is torch.int64 of shape \(2,\), expected int64 \(3,\)"):
        ops.transformer_block(x, params, n_head=2, seeds=SEEDS[:2])
    with pytest.raises(ValueError, match="12"):
        ops.transformer_block(x, params[:-1], n_head=2)


# ---- where a model takes it


@pytest.fixture
def calls(monkeypatch):
    """How often the op was called."""
    count = []
    whole = ops.transformer_block
    monkeypatch.setattr(ops, "transformer_block", lambda *args, **kwargs: count.append(1) or whole(*args, **kwargs))
    return count


def model(**options):
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=50, block_size=16, n_layer=2, n_head=2, n_embd=16, **options))


def losses(gpt):
    ids = torch.arange(32).view(2, 16)
    loss = gpt(ids, ids.roll(1))[1]
    loss.backward()
    return [loss.detach(), *(p.grad for p in gpt.parameters())]


def test_a_model_takes_it_and_the_numbers_are_the_same(calls):
    whole = losses(model())
    assert len(calls) == 2
    with ops.use_backend("reference"):
        parts = losses(model())
    assert len(calls) == 2
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)


def test_a_model_with_changed_parts_does_not(calls):
    seen = []
    hooked = model()
    hooked.h[0].mlp.c_fc.register_forward_hook(lambda *_: seen.append(1))
    losses(hooked)
    assert len(calls) == 1
    assert seen
    uneven = model(dropout=0.5)
    uneven.h[0].mlp.dropout = 0.25
    losses(uneven)
    assert len(calls) == 2
    uneven.eval()
    losses(uneven)
    assert len(calls) == 4


def test_dropout_in_a_model_is_the_op_s(calls):
    gpt = model(dropout=0.5)
    torch.manual_seed(1)
    first = losses(gpt)
    gpt.zero_grad()
    torch.manual_seed(1)
    gpt.activation_checkpointing = True
    torch.testing.assert_close(losses(gpt), first)  # the same masks when a block is computed again
    gpt.zero_grad()
    assert not torch.equal(losses(gpt)[0], first[0])
    assert len(calls) == 2 + 4 + 4
    gpt.zero_grad()
    gpt.eval()
    torch.testing.assert_close(losses(gpt), losses(model()))


def test_loss_without_logits_is_the_same():
    gpt = model()
    ids = torch.arange(32).view(2, 16)
    logits, loss = gpt(ids, ids.roll(1))
    without, same = gpt(ids, ids.roll(1), need_logits=False)
    assert logits.shape == (2, 16, 50)
    assert without is None
    torch.testing.assert_close(loss, same)
