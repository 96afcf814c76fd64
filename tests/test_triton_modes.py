"""Every op on the Triton engine inside torch.compile without a graph break, and under autocast."""

import pytest
import torch
from parity import random
from triton_engine import DEVICE, triton_engine  # noqa: F401

from fastgpt import ops

pytestmark = pytest.mark.usefixtures("triton_engine")

IDS = torch.tensor([[3, 1, 4], [1, 5, 9]])


def heads(seed):
    return random(2, 4, 9, 16, seed=seed)


def lists():
    return [random(6, 8), random(6, 8, seed=1), random(8, seed=2), random(8, seed=3)]


def few_heads(q, k, v):
    return ops.attention(q, k[:, :2], v[:, :2], is_causal=True)


def turned(x):
    return ops.rope(x, *(table.to(x.device) for table in ops.rope_tables(16, 9)))


CASES = {
    "softmax": (lambda x, *_: ops.softmax(x), lists),
    "log_softmax": (lambda x, *_: ops.log_softmax(x), lists),
    "gelu": (lambda x, *_: ops.gelu(x, approximate="tanh"), lists),
    "silu": (lambda x, *_: ops.silu(x), lists),
    "swiglu": (lambda x, y, *_: ops.swiglu(x, y), lists),
    "geglu": (lambda x, y, *_: ops.geglu(x, y), lists),
    "layer_norm": (lambda x, _, w, b: ops.layer_norm(x, (8,), w, b), lists),
    "rms_norm": (lambda x, _, w, b: ops.rms_norm(x, (8,), w), lists),
    "add_layer_norm": (lambda x, y, w, b: ops.add_layer_norm(x, y, (8,), w, b)[0], lists),
    "add_rms_norm": (lambda x, y, w, b: ops.add_rms_norm(x, y, (8,), w)[0], lists),
    "embedding": (lambda w, *_: ops.embedding(IDS.to(w.device), w), lambda: [random(10, 8)]),
    "attention": (few_heads, lambda: [heads(0), heads(1), heads(2)]),
    "rope": (turned, lambda: [heads(0)]),
    "cross_entropy": (lambda x, *_: ops.cross_entropy(x, IDS.view(-1).to(x.device) % 8), lists),
    "linear_cross_entropy": (
        lambda x, y, *_: ops.linear_cross_entropy(x, y, IDS.view(-1).to(x.device) % 6),
        lists,
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    function, inputs = CASES[request.param]
    return function, [x.to(DEVICE) for x in inputs()]


def run(function, inputs):
    """The result, and the inputs' gradients under random gradients of it; None where an input is not used."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    torch.manual_seed(0)
    out.backward(torch.randn_like(out))
    return out.detach(), *(leaf.grad for leaf in leaves)


def test_compiles_into_one_graph(case):
    function, inputs = case
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, inputs), run(function, inputs))


def test_autocast_gives_what_the_formulas_give(case):
    """Dtypes as they are on the formulas; values to bf16's precision."""
    function, inputs = case
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = run(function, inputs)
        with ops.use_backend("reference"):
            theirs = run(function, inputs)
    for mine, wanted in zip(ours, theirs, strict=True):
        if wanted is None:
            assert mine is None
        else:
            assert mine.dtype == wanted.dtype
            torch.testing.assert_close(mine, wanted, rtol=2e-2, atol=2e-2)
