"""add_layer_norm and add_rms_norm: every engine against the formula, and against the two steps they replace."""

import pytest
import torch
import torch.nn.functional as F
from parity import DTYPES, assert_parity, check_op, random
from torch.library import opcheck

from fastgpt import ops
from fastgpt.ops import reference

BF16 = torch.bfloat16
NAMES = ["add_layer_norm", "add_rms_norm"]


def call(engine, name, x, residual, *params):
    """(normed, summed) by `ops`, by plain torch, or by the formula; the parameters may be left out."""
    weight, bias = (*params, None, None)[:2]
    if engine == "formula":
        if name == "add_layer_norm":
            return reference.add_layer_norm(x, residual, weight, bias, 1e-5)[:2]
        return reference.add_rms_norm(x, residual, weight, 1e-5)[:2]
    size = x.shape[-1:]
    if engine == "ours":
        if name == "add_layer_norm":
            return ops.add_layer_norm(x, residual, size, weight, bias, 1e-5)
        return ops.add_rms_norm(x, residual, size, weight, 1e-5)
    summed = x + residual
    weight = None if weight is None else weight.to(summed.dtype)
    if name == "add_layer_norm":
        return F.layer_norm(summed, size, weight, bias, 1e-5), summed
    return F.rms_norm(summed, size, weight, 1e-5), summed


def joined(engine, name, results=(0, 1)):
    """A function of the tensors that gives some of the results, as check_op wants it."""
    return lambda *tensors: torch.stack([call(engine, name, *tensors)[i] for i in results])


def check(name, inputs, results=(0, 1), what=""):
    check_op(*(joined(engine, name, results) for engine in ("ours", "torch", "formula")), inputs, what)


def params(name, size, dtype=torch.float32):
    return [random(size, dtype=dtype, seed=seed) for seed in ((2, 3) if name == "add_layer_norm" else (2,))]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (3, 5), (2, 9, 33), (70, 128), (3, 768)], ids=str)
def test_parity(isa, name, dtype, shape):
    x, residual = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    check(name, [x, residual, *params(name, shape[-1], dtype)], what=f"{shape}")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("results", [(0,), (1,)], ids=["normed only", "summed only"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_result_used(isa, name, dtype, results):
    check(name, [random(6, 50, dtype=dtype), random(6, 50, dtype=dtype, seed=1)], results)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("swapped", [False, True])
def test_mixed_dtypes_as_autocast_leaves_them(isa, name, swapped):
    tensors = [random(21, 40, dtype=BF16), random(21, 40, seed=1)]
    tensors = [t.requires_grad_() for t in (*(reversed(tensors) if swapped else tensors), *params(name, 40))]
    grads = random(21, 40, seed=7), random(21, 40, seed=8)
    exact_leaves = [t.detach().double().requires_grad_() for t in tensors]
    found = {}
    for engine, leaves in (("ours", tensors), ("torch", tensors), ("formula", exact_leaves)):
        results = call(engine, name, *leaves)
        found[engine] = [*results, *torch.autograd.grad(results, leaves, [g.to(results[0].dtype) for g in grads])]
    for i, parts in enumerate(zip(found["ours"], found["torch"], found["formula"], strict=True)):
        assert_parity(*parts, f"result {i}")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_is_torchs_to_the_bit(isa, name, dtype):
    x, residual = random(9, 70, dtype=dtype), random(9, 70, dtype=dtype, seed=1, scale=30.0)
    x[2, 3], x[3, 4], residual[4, 5] = float("nan"), float("inf"), -float("inf")
    _, summed = call("ours", name, x, residual)
    torch.testing.assert_close(summed, x + residual, rtol=0, atol=0, equal_nan=True)
    normed, _ = call("ours", name, x, residual)
    torchs, exact = call("torch", name, x, residual)[0], call("formula", name, x.double(), residual.double())[0]
    assert_parity(normed[[0, 1, 5]], torchs[[0, 1, 5]], exact[[0, 1, 5]])
    assert normed[2:5].isnan().any(-1).all()


@pytest.mark.parametrize("name", NAMES)
def test_strided_and_empty(isa, name):
    check(name, [random(40, 30).t(), random(30, 40, seed=1), *params(name, 40)], what="transposed")
    check(name, [random(30, 40), random(30, 1, 40, seed=1).expand(30, 2, 40)[:, 1], *params(name, 40)], what="slice")
    normed, summed = call("ours", name, torch.empty(0, 7), torch.empty(0, 7))
    assert normed.shape == summed.shape == (0, 7)


@pytest.mark.parametrize("name", NAMES)
def test_several_dimensions(name):
    x, residual = random(5, 4, 6), random(5, 4, 6, seed=1)
    normed, summed = getattr(ops, name)(x, residual, (4, 6), eps=1e-5)
    expected = (F.layer_norm if name == "add_layer_norm" else F.rms_norm)(x + residual, (4, 6), eps=1e-5)
    torch.testing.assert_close((normed, summed), (expected, x + residual))


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_for_any_number_of_threads(isa, name):
    inputs = [random(999, 96), random(999, 96, seed=1), *params(name, 96)]
    grads = random(999, 96, seed=8), random(999, 96, seed=9)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in inputs]
            outputs = call("ours", name, *leaves)
            results.append([*outputs, *torch.autograd.grad(outputs, leaves, grads)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    inputs = [random(3, 4, 5, dtype=torch.float64), random(3, 4, 5, dtype=torch.float64, seed=1)]
    inputs = [t.requires_grad_() for t in (*inputs, *params(name, 5, torch.float64))]
    assert torch.autograd.gradcheck(lambda *t: call("ours", name, *t), inputs)
    assert torch.autograd.gradcheck(lambda *t: call("ours", name, *t), inputs[:2])


@pytest.mark.parametrize("name", NAMES)
def test_only_the_gradients_asked_for(name):
    x, residual, w = random(4, 8).requires_grad_(), random(4, 8, seed=1), random(8, seed=2).requires_grad_()
    normed, summed = call("ours", name, x, residual, w)
    (normed.sum() + summed.sum()).backward()
    assert residual.grad is None
    assert x.grad is not None
    assert w.grad is not None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (BF16, BF16), (BF16, torch.float32)], ids=str)
def test_opcheck(name, dtypes):
    op, backward = (getattr(torch.ops.fastgpt, stem).default for stem in (name, f"{name}_backward"))
    x, residual = random(3, 4, 9, dtype=dtypes[0]), random(3, 4, 9, dtype=dtypes[1], seed=1)
    weights = params(name, 9)
    opcheck(op, (x.clone().requires_grad_(), residual.clone().requires_grad_(), *weights, 1e-5))
    opcheck(op, (x, residual, *[None for _ in weights], 1e-5))
    normed, summed, *statistics = op(x, residual, *weights, 1e-5)
    for needs in ((True, True), (False, False)):
        for grad_sum in (normed, None):
            opcheck(backward, (normed, grad_sum, summed, weights[0], *statistics, *needs))


@pytest.mark.parametrize("name", NAMES)
def test_compile(name):
    inputs = [t.requires_grad_() for t in (random(5, 24), random(5, 24, seed=1), *params(name, 24))]

    def function(x, *rest):
        normed, summed = call("ours", name, x * 2, *rest)
        return normed.square() + summed

    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), function(*inputs))
    mine = torch.autograd.grad(compiled(*inputs).sum(), inputs)
    torch.testing.assert_close(mine, torch.autograd.grad(function(*inputs).sum(), inputs))


@pytest.mark.parametrize("name", NAMES)
def test_bad_input(name):
    function = getattr(ops, name)
    with pytest.raises(ValueError, match=rf"{name}: residual has shape \(4,\), expected the input's \(3, 4\)"):
        function(torch.ones(3, 4), torch.ones(4), (4,))
    with pytest.raises(ValueError, match="normalized_shape"):
        function(torch.ones(3, 4), torch.ones(3, 4), (3,))
    with pytest.raises(ValueError, match="weight has shape"):
        function(torch.ones(3, 4), torch.ones(3, 4), (4,), torch.ones(3))
    with pytest.raises(TypeError, match="residual has dtype"):
        function(torch.ones(3, 4), torch.ones(3, 4, dtype=torch.int32), (4,))
