"""The Triton kernels of adamw and grad_norm against the formulas."""

import pytest
import torch
from parity import assert_parity, random
from triton_engine import DEVICE, gpu, opcheck, triton_engine  # noqa: F401

from fastgpt import ops
from fastgpt.kernels import adamw
from fastgpt.ops import graphs, reference

pytestmark = pytest.mark.usefixtures("triton_engine")

SHAPES = [(3, 5), (1,), (0,), (4096,), (70, 97)]
DECAYS = [0.1, 0.0, 0.3, 0.2, 0.05]


def lists(shapes=SHAPES):
    params, grads, firsts = ([random(*shape, seed=10 * k + i) for i, shape in enumerate(shapes)] for k in range(3))
    return [params, grads, firsts, [x.abs() * 0.1 for x in firsts]]


def here(tensors):
    return [x.clone().to(DEVICE) for x in tensors]


def update(state, shadows=(), **options):
    options = {
        "step": 3,
        "lr": 0.01,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "weight_decay": DECAYS,
        "grad_scale": 0.5,
    } | options
    ops.adamw(*state, shadows=shadows, **options)


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_parity(step):
    ours = [here(tensors) for tensors in lists()]
    update(ours, step=step)
    torchs, exact = lists(), [[x.double() for x in tensors] for tensors in lists()]
    for state in (torchs, exact):
        reference.adamw(*state, DECAYS, 0.01, 0.9, 0.95, 1e-8, 0.5, step)
    for name, mine, theirs, truth in zip(("p", "g", "m", "v"), ours, torchs, exact, strict=True):
        for i in (0, 1, 3, 4):
            assert_parity(mine[i].cpu(), theirs[i], truth[i], f"{name} {SHAPES[i]}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("zero_grads", [False, True])
def test_shadows_and_zeroed_gradients(dtype, zero_grads):
    plain, ours = ([here(tensors) for tensors in lists()] for _ in range(2))
    shadows = [torch.full_like(p, 7.0, dtype=dtype) for p in ours[0]]
    update(plain)
    update(ours, shadows, zero_grads=zero_grads)
    for k in (0, 2, 3):
        torch.testing.assert_close(ours[k], plain[k], rtol=0, atol=0)
    wanted = [torch.zeros_like(g) for g in plain[1]] if zero_grads else plain[1]
    torch.testing.assert_close(ours[1], wanted, rtol=0, atol=0)
    torch.testing.assert_close([x.cpu() for x in shadows], [p.cpu().to(dtype) for p in ours[0]], rtol=0, atol=0)


@pytest.mark.parametrize("begin", [100, 101])  # at a multiple of 16 bytes, and not
def test_nothing_beside_the_tensors_is_written(begin):
    end = begin + 4100
    room = torch.full((4, 5000), 3.0, device=DEVICE)
    update([[row[begin:end]] for row in room], weight_decay=0.1)
    assert (room[:, :begin] == 3.0).all()
    assert (room[:, end:] == 3.0).all()
    assert (room[0, begin:end] == room[0, begin]).all()
    assert room[0, begin] != 3.0


def test_tables_follow_the_tensors():
    """A second list of the same sizes elsewhere is another one."""
    first, second = ([here(tensors) for tensors in lists([(70, 97)])] for _ in range(2))
    kept = first[0][0].clone()
    update(first, weight_decay=0.1)
    updated = first[0][0].clone()
    update(second, weight_decay=0.1)
    assert not torch.equal(updated, kept)
    torch.testing.assert_close(first[0][0], updated, rtol=0, atol=0)
    torch.testing.assert_close(second[0][0], updated, rtol=0, atol=0)


def test_programs_are_not_listed_again_for_new_addresses():
    """Gradients that each step makes anew lie elsewhere; listing a large model's programs takes longer than its update."""
    adamw._programs.cache_clear()
    for _ in range(3):
        update([here(tensors) for tensors in lists([(4100,), (3,), (0,), (2048,)])], weight_decay=0.1)
    assert adamw._programs.cache_info().misses == 1
    programs = adamw._programs((4100, 3, 0, 2048), torch.device(DEVICE)).tolist()
    assert programs == [[0, 0], [0, 1], [0, 2], [1, 0], [3, 0]]


def test_grad_norm():
    grads = lists()[1]
    grads[3] *= 1e25  # its square is beyond float32
    norm = ops.grad_norm(here(grads))
    assert norm.dtype == torch.float64
    assert norm.device.type == "cpu"
    torch.testing.assert_close(norm, reference.grad_norm(grads), rtol=1e-12, atol=0)
    assert ops.grad_norm([torch.empty(0, device=DEVICE)]) == 0


def test_opcheck():
    state = [here(tensors) for tensors in lists()]
    opcheck(torch.ops.fastgpt.grad_norm.default, (state[1],))
    shadows = [x.bfloat16() for x in state[0]]
    args = (*state, DECAYS, 1e-3, 0.9, 0.99, 1e-8, 0.5, 3, shadows, True)
    opcheck(torch.ops.fastgpt.adamw.default, args)


def test_tables_that_a_graph_reads_outlive_the_cache(monkeypatch):
    monkeypatch.setattr(graphs, "_held", [])
    update([here(tensors) for tensors in lists()])
    assert graphs._held == []
    monkeypatch.setattr(graphs, "_capturing", lambda device: True)
    state = [here(tensors) for tensors in lists()]
    update(state)
    ops.grad_norm(state[1])
    addresses = [table.tolist()[0] for table in graphs._held if table.dtype == torch.int64 and table.dim() == 2]
    assert [x.data_ptr() for x in state[0]] in addresses
    assert [x.data_ptr() for x in state[1]] in addresses
    assert len(graphs._held) == 5  # two tables each, and the decays


class TestRealSizes:
    pytestmark = gpu

    def test_parity(self):
        shapes = [(50257, 768), (3072, 768), (768,), (1025, 97)]
        ours, torchs, exact = ([[x.to(DEVICE) for x in tensors] for tensors in lists(shapes)] for _ in range(3))
        exact = [[x.double() for x in tensors] for tensors in exact]
        update(ours, weight_decay=0.1)
        for state in (torchs, exact):
            reference.adamw(*state, [0.1] * 4, 0.01, 0.9, 0.95, 1e-8, 0.5, 3)
        for mine, theirs, truth in zip(ours[0], torchs[0], exact[0], strict=True):
            assert_parity(mine.cpu(), theirs.cpu(), truth.cpu(), "params")
        torch.testing.assert_close(ops.grad_norm(ours[1]), reference.grad_norm(exact[1]), rtol=1e-12, atol=0)

    def test_a_tensor_of_more_than_two_to_the_31_elements(self):
        state = [[torch.full((2**31 + 5000,), 0.5, device=DEVICE)] for _ in range(4)]
        update(state, weight_decay=0.1)
        assert state[0][0][-1] == state[0][0][0] != 0.5

    def test_in_a_cuda_graph(self):
        state, plain = ([here(tensors) for tensors in lists()] for _ in range(2))
        update(plain)
        stream = torch.cuda.Stream()
        kept = [[x.clone() for x in tensors] for tensors in state]
        with torch.cuda.stream(stream):
            update(state)  # makes the tables
        for tensors, before in zip(state, kept, strict=True):
            torch._foreach_copy_(tensors, before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            update(state)
        graph.replay()
        torch.testing.assert_close(state[0], plain[0], rtol=0, atol=0)
