"""The Triton kernels of attention with windows, a soft cap, dropout and packed sequences, and those of a decode step."""

import math

import pytest
import torch
import torch.nn.functional as F
from parity import random
from triton_engine import DEVICE, DTYPES, check_op, gpu, there, triton_engine  # noqa: F401

from fastgpt import ops
from fastgpt.ops import reference

pytestmark = pytest.mark.usefixtures("triton_engine")

SEED = torch.tensor(987654321987654321)


def inputs(batch, heads, kv_heads, queries, keys, dim, dtype=torch.float32):
    shapes = ((batch, heads, queries, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, dim))
    return [random(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]


def arguments(is_causal=False, window=(-1, -1), softcap=0.0, dropout_p=0.0, seed=None, cu_seqlens=(None, None)):
    """The op's, for the formula."""
    return is_causal, dropout_p, seed, *window, softcap, *cu_seqlens


def formula(q, k, v, **options):
    is_causal, *more = arguments(**options)
    return reference.attention(q, k, v, is_causal, 1 / math.sqrt(q.shape[3]), *more)[0]


def in_torch(q, k, v, **options):
    """torch's own attention under the mask that the options make; with a soft cap or dropout, which it has not, torch's ops."""
    is_causal, dropout_p, seed, left, right, softcap, cu_q, cu_k = arguments(**options)
    seen = reference.visible(q.shape[2], k.shape[2], is_causal, left, right, cu_q, cu_k, torch.device("cpu"))
    seen = seen.to(q.device)
    if not softcap and not dropout_p:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[3])
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores.masked_fill(~seen, -math.inf)
    lse = torch.logsumexp(scores, -1, keepdim=True)
    weights = torch.exp(scores - torch.where(lse == -math.inf, 0.0, lse))
    if dropout_p:
        factor = reference.dropout_mask(weights.shape, seed, dropout_p).to(q.device) / (1 - dropout_p)
        weights = weights * factor.to(q.dtype)
    return weights @ v


def check(leaves, **options):
    def on_device(x):
        return tuple(map(on_device, x)) if isinstance(x, tuple) else x.to(DEVICE) if isinstance(x, torch.Tensor) else x

    there_options = {name: on_device(value) for name, value in options.items()}
    check_op(
        lambda *x: ops.attention(*x, **there_options),
        lambda *x: in_torch(*x, **options),
        lambda *x: formula(*x, **options),
        leaves,
        str(options),
    )


WINDOWS = [(True, (40, -1)), (False, (70, 0)), (False, (9, 5)), (False, (-1, 33)), (True, (1, -1))]


@pytest.mark.parametrize(("is_causal", "window"), WINDOWS)
def test_windows(is_causal, window):
    for lengths in ((70, 100), (100, 40)):
        check(inputs(1, 1, 1, *lengths, 16), is_causal=is_causal, window=window)


@pytest.mark.parametrize(
    ("dtype", "dim"), [(torch.float32, 24), (torch.float16, 24), (torch.bfloat16, 64), (torch.float32, 96)], ids=str
)
def test_all_options_at_once(dtype, dim):
    options = {"window": (30, 2), "softcap": 2.0, "dropout_p": 0.2, "seed": SEED}
    check(inputs(1, 2, 1, 20, 72, dim, dtype), **options)
    cu = torch.tensor([0, 30, 33, 50])
    check(inputs(1, 2, 1, 50, 50, dim, dtype), cu_seqlens=(cu, cu), is_causal=True, **{**options, "window": (20, -1)})


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(softcap):
    check([4 * x for x in inputs(1, 1, 1, 40, 70, 16)], softcap=softcap, is_causal=True)


@pytest.mark.parametrize(("keys", "p"), [(72, 0.1), (71, 0.6)])  # in fours, and not
def test_dropout(keys, p):
    check(inputs(2, 2, 1, 40, keys, 16), is_causal=p > 0.5, dropout_p=p, seed=SEED)


@pytest.mark.parametrize("keys", [64, 67])
def test_the_mask_is_that_of_ops_dropout(keys):
    """Equal weights and values of unit vectors show every factor: out[b, h, i, j] = factor / keys."""
    q, k = torch.zeros(2, 1, 20, keys), torch.zeros(2, 1, keys, keys)
    v = torch.eye(keys).expand(2, 1, keys, keys)
    out = there(lambda *x: ops.attention(*x, dropout_p=0.3, seed=5))(q, k, v) * keys
    with ops.use_backend("reference"):
        want = ops.dropout(torch.ones(2, 1, 20, keys), 0.3, seed=5)
    torch.testing.assert_close(out.contiguous(), want)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_packed_sequences(is_causal):
    cu_q, cu_k = torch.tensor([0, 70, 70, 73, 100]), torch.tensor([0, 40, 60, 60, 110])
    check(inputs(1, 2, 1, 100, 110, 16), cu_seqlens=(cu_q, cu_k), is_causal=is_causal)
    check(inputs(1, 1, 1, 100, 110, 16), cu_seqlens=(cu_q.int(), cu_k.int()), is_causal=is_causal, window=(20, 3))


def test_packed_dropout():
    cu_q, cu_k = torch.tensor([0, 20, 43]), torch.tensor([0, 21, 47])
    check(inputs(1, 2, 1, 43, 47, 16), cu_seqlens=(cu_q, cu_k), dropout_p=0.3, seed=SEED)


def test_the_longest_sequence_bounds_the_work():
    q, k, v = (x.to(DEVICE) for x in inputs(1, 1, 1, 100, 100, 16))
    cu = torch.tensor([0, 45, 100], device=DEVICE)
    bounded = ops.attention(q, k, v, cu_seqlens=(cu, cu), max_seqlens=(64, 64))
    assert torch.equal(bounded, ops.attention(q, k, v, cu_seqlens=(cu, cu)))


DECODE = [{}, {"is_causal": False}, {"window": (100, -1)}, {"window": (7, 3), "is_causal": False}, {"softcap": 1.0}]


@pytest.mark.parametrize("options", DECODE, ids=str)
@pytest.mark.parametrize(("queries", "dim", "heads"), [(1, 64, 2), (3, 24, 4)])
def test_decode(options, queries, dim, heads):
    q, k, v = inputs(4, heads, 2, queries, 300, dim)
    q, index = q[:3], [torch.tensor([2, 0, 3]), torch.tensor([0, 13, 100]), torch.tensor([300, 280, 102])]
    on_device = (x.to(DEVICE) for x in index)
    names = ("rows", "starts", "ends")
    ours = ops.attention_decode(
        *(x.to(DEVICE) for x in (q, k, v)), **dict(zip(names, on_device, strict=True)), **options
    )
    scale, causal = 1 / math.sqrt(dim), options.get("is_causal", True)
    more = (*options.get("window", (-1, -1)), options.get("softcap", 0.0))
    exact = reference.attention_decode(q.double(), k.double(), v.double(), *index, causal, scale, *more)
    torch.testing.assert_close(ours.cpu().double(), exact, rtol=2e-5, atol=2e-6)
    assert ours.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_of_any_dtype_and_strides(dtype):
    q, k, v = inputs(2, 6, 2, 1, 290, 40, dtype)
    ends = torch.tensor([0, 277], dtype=torch.int32)
    heads_last = [x.transpose(1, 2).contiguous().transpose(1, 2).to(DEVICE) for x in (q, k, v)]
    ours = ops.attention_decode(*heads_last, ends=ends.to(DEVICE)).cpu()
    exact = reference.attention_decode(q.double(), k.double(), v.double(), None, None, ends, True, 1 / math.sqrt(40))
    assert (ours[0] == 0).all()  # no keys
    atol = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]
    torch.testing.assert_close(ours.double(), exact, rtol=atol, atol=atol)


def test_attention_of_few_queries_is_split_over_the_keys():
    """Generation calls ops.attention: the same result and log-sum-exp from the kernels of a decode step."""
    from fastgpt.kernels import attention_decode, attention_tiles

    for queries, is_causal in ((1, True), (3, True), (3, False)):
        q, k, v = inputs(1, 2, 1, queries, 260, 16)
        assert attention_decode.is_better(q, k, attention_tiles.Options(is_causal, 0.25))
        got = torch.ops.fastgpt.attention(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), is_causal, 0.25)
        exact = reference.attention(q.double(), k.double(), v.double(), is_causal, 0.25)
        for mine, wanted in zip(got, exact, strict=True):
            torch.testing.assert_close(mine.cpu().double(), wanted, rtol=1e-5, atol=1e-6)
        check([q, k, v], is_causal=is_causal)
    long = inputs(1, 2, 1, 300, 300, 16)
    assert not attention_decode.is_better(*long[:2], attention_tiles.Options(True, 0.25))


def test_a_nan_of_the_cache_reaches_only_who_sees_it():
    q, k, v = inputs(1, 2, 2, 2, 300, 16)
    k[0, 1, 299] = float("nan")
    out = there(ops.attention_decode)(q, k, v)
    assert out.isnan().all(-1).tolist() == [[[False, False], [False, True]]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestRealSizes:
    pytestmark = gpu

    @pytest.mark.parametrize("dim", [16, 32, 64, 80, 128, 256])
    @pytest.mark.parametrize(
        "options",
        [
            {"is_causal": True, "window": (255, -1)},
            {"window": (100, 50)},
            {"is_causal": True, "softcap": 30.0},
            {"is_causal": True, "dropout_p": 0.1, "seed": SEED},
        ],
        ids=str,
    )
    def test_parity(self, dtype, options, dim):
        check(inputs(2, 6, 3, 1024, 1024, dim, dtype), **options)
        check(inputs(1, 4, 2, 777, 1023, dim, dtype), **options)

    @pytest.mark.parametrize("dim", [64, 128])
    @pytest.mark.parametrize("options", [{}, {"window": (200, -1)}, {"dropout_p": 0.2, "seed": SEED}], ids=str)
    def test_packed_parity(self, dtype, options, dim):
        cu = torch.tensor([0, 700, 701, 1500, 2048], dtype=torch.int32)
        check(inputs(1, 8, 4, 2048, 2048, dim, dtype), cu_seqlens=(cu, cu), is_causal=True, **options)

    @pytest.mark.parametrize("dim", [64, 128, 256])
    @pytest.mark.parametrize(("batch", "heads", "kv_heads", "queries"), [(1, 12, 12, 1), (8, 32, 8, 1), (2, 32, 4, 5)])
    def test_decode_parity(self, dtype, dim, batch, heads, kv_heads, queries):
        leaves = inputs(batch, heads, kv_heads, queries, 8192, dim, dtype)
        ends = torch.arange(8192, 8192 - 1000 * batch, -1000, dtype=torch.int32)
        ours = ops.attention_decode(*(x.to(DEVICE) for x in leaves), ends=ends.to(DEVICE)).cpu()
        exact = reference.attention_decode(*(x.double() for x in leaves), None, None, ends, True, 1 / math.sqrt(dim))
        atol = {torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}[dtype]
        torch.testing.assert_close(ours.double(), exact, rtol=8 * atol, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestOnAGpu:
    """What only a device has: graphs, and the order in which programs finish."""

    pytestmark = gpu

    def test_a_graph_follows_its_inputs(self, dtype):
        q, k, v = (x.to(DEVICE).requires_grad_() for x in inputs(2, 6, 3, 200, 200, 64, dtype))
        seed = torch.tensor(3, device=DEVICE)
        cache = [x.detach() for x in (q[:, :, :1], k, v)]
        ends = torch.tensor([150, 200], dtype=torch.int32, device=DEVICE)

        def step():
            out = ops.attention(q, k, v, is_causal=True, window=(90, -1), softcap=20.0, dropout_p=0.1, seed=seed)
            return out, *torch.autograd.grad(out.sum(), (q, k, v)), ops.attention_decode(*cache, ends=ends)

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            step()  # compiles
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            q.add_(0.5)
            seed.fill_(8)
            ends.fill_(33)
        graph.replay()
        for mine, wanted in zip(captured, step(), strict=True):
            assert torch.equal(mine, wanted)

    def test_same_bits_on_every_run(self, dtype):
        leaves = [x.to(DEVICE).requires_grad_() for x in inputs(4, 12, 4, 1024, 1024, 64, dtype)]

        def step():
            out = ops.attention(*leaves, is_causal=True, window=(300, -1), dropout_p=0.1, seed=1)
            return (
                out,
                *torch.autograd.grad(out.sum(), leaves),
                ops.attention_decode(leaves[0][:, :, :2].detach(), *leaves[1:]),
            )

        first = step()
        for _ in range(20):
            assert all(torch.equal(a, b) for a, b in zip(first, step(), strict=True))
