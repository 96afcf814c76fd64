"""adamw and grad_norm: every engine against the formula and torch's optimizer."""

import pytest
import torch
from parity import assert_parity, random
from torch.library import opcheck

from fastgpt import ops
from fastgpt.train.optimizer import AdamW

SHAPES = [(1,), (3, 5), (16,), (40, 33), (2, 16384), (70000,)]


def tensors(seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[torch.Tensor]:
    return [random(*shape, dtype=dtype, seed=seed + i, scale=scale) for i, shape in enumerate(SHAPES)]


def run_ours(steps: int, dtype: torch.dtype, decays: list[float], max_norm: float) -> list[torch.Tensor]:
    params = tensors(0, dtype)
    exp_avgs, exp_avg_sqs = ([torch.zeros_like(p) for p in params] for _ in range(2))
    for step in range(1, steps + 1):
        grads = tensors(100 * step, torch.float32, 0.1)
        grads = [g.to(dtype) for g in grads]
        scale = min(1.0, max_norm / (ops.grad_norm(grads).item() + 1e-6))
        ops.adamw(
            params, grads, exp_avgs, exp_avg_sqs,
            step=step, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=decays, grad_scale=scale,
        )  # fmt: skip
    return [*params, *exp_avgs, *exp_avg_sqs]


def run_torch(steps: int, dtype: torch.dtype, decays: list[float], max_norm: float) -> list[torch.Tensor]:
    params = [p.requires_grad_() for p in tensors(0, dtype)]
    groups = [{"params": [p], "weight_decay": decay} for p, decay in zip(params, decays, strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, fused=True)
    for step in range(1, steps + 1):
        for p, g in zip(params, tensors(100 * step, torch.float32, 0.1), strict=True):
            p.grad = g.to(dtype)
        torch.nn.utils.clip_grad_norm_(params, max_norm)
        optimizer.step()
    states = [optimizer.state[p] for p in params]
    return [*params, *(s["exp_avg"] for s in states), *(s["exp_avg_sq"] for s in states)]


def test_parity(isa):
    decays = [0.1, 0.0, 0.0, 0.1, 0.3, 0.01]
    ours = run_ours(7, torch.float32, decays, 1.0)
    torchs = run_torch(7, torch.float32, decays, 1.0)
    exact = run_torch(7, torch.float64, decays, 1.0)
    for i, parts in enumerate(zip(ours, torchs, exact, strict=True)):
        assert_parity(*parts, f"tensor {i}")


def test_the_formula_is_torchs():
    decays = [0.1] * len(SHAPES)
    for mine, theirs in zip(
        run_ours(3, torch.float64, decays, 0.5), run_torch(3, torch.float64, decays, 0.5), strict=True
    ):
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-12, atol=1e-13)


def test_grad_norm(isa):
    grads = tensors(5)
    exact = torch.cat([g.double().flatten() for g in grads]).norm()
    assert abs(ops.grad_norm(grads) - exact) < 1e-7 * exact
    grads[3][2, 2] = float("nan")
    assert ops.grad_norm(grads).isnan()


def test_same_bits_for_any_number_of_threads(isa):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append([ops.grad_norm(tensors(5)), *run_ours(2, torch.float32, [0.1] * len(SHAPES), 1.0)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_opcheck():
    opcheck(torch.ops.fastgpt.grad_norm.default, (tensors(0)[:3],))
    lists = [tensors(10 * i)[:3] for i in range(3)]
    squares = [x.square() for x in tensors(40)[:3]]
    opcheck(
        torch.ops.fastgpt.adamw.default, (*lists, squares, [0.1, 0.0, 0.2], 1e-3, 0.9, 0.99, 1e-8, 0.5, 3, [], False)
    )
    shadows = [x.bfloat16() for x in lists[0]]
    opcheck(
        torch.ops.fastgpt.adamw.default,
        (*lists, squares, [0.1, 0.0, 0.2], 1e-3, 0.9, 0.99, 1e-8, 0.5, 3, shadows, True),
    )


def test_strided_and_half_parameters_go_to_the_formula():
    for make in (lambda x: x.t().contiguous().t(), lambda x: x.bfloat16()):
        p, g = make(random(6, 5)), make(random(6, 5, seed=1))
        m, v = torch.zeros_like(p), torch.zeros_like(p)
        before = p.clone()
        ops.adamw([p], [g], [m], [v], step=1, lr=0.1)
        assert ((p - before).abs() > 0.05).all()  # the first step of Adam is lr * sign(g), less the decay


@pytest.mark.parametrize("zero_grads", [False, True])
@pytest.mark.parametrize("shadowed", [False, True])
def test_shadows_and_zeroed_gradients(isa, shadowed, zero_grads):
    """They change nothing else, to the bit; the shadows are the new parameters, rounded."""

    def run(**options):
        state = [tensors(0), tensors(100), [torch.zeros_like(p) for p in tensors(0)], [x.square() for x in tensors(7)]]
        ops.adamw(*state, step=2, lr=0.1, weight_decay=0.1, grad_scale=0.5, **options)
        return state

    plain = run()
    shadows = [torch.full_like(p, 7.0, dtype=torch.bfloat16) for p in plain[0]] if shadowed else []
    params, grads, *moments = run(shadows=shadows, zero_grads=zero_grads)
    torch.testing.assert_close([params, *moments], [plain[0], *plain[2:]], rtol=0, atol=0)
    expected = [torch.zeros_like(g) for g in grads] if zero_grads else tensors(100)
    torch.testing.assert_close(grads, expected, rtol=0, atol=0)
    torch.testing.assert_close(shadows, [p.bfloat16() for p in params] if shadowed else [], rtol=0, atol=0)


def test_zeroed_gradients_are_seen_by_autograd():
    g = random(4, seed=1).requires_grad_()
    y = g.square().sum()
    ops.adamw([random(4)], [g], [torch.zeros(4)], [torch.zeros(4)], step=1, lr=0.1, zero_grads=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_the_optimizer_keeps_its_shadows():
    model = torch.nn.Linear(5, 3)
    optimizer = AdamW(model.parameters(), lr=0.1)
    shadow = optimizer.shadow(model.weight)
    for _ in range(2):
        model(random(2, 5)).sum().backward()
        optimizer.step(zero_grads=True)
        assert optimizer.shadow(model.weight) is shadow
        assert torch.equal(shadow, model.weight.detach().bfloat16())
        assert all((p.grad == 0).all() for p in model.parameters())


def test_an_update_is_seen_by_autograd():
    p = random(4).requires_grad_()
    y = p.square().sum()
    ops.adamw([p], [random(4, seed=1)], [torch.zeros(4)], [torch.zeros(4)], step=1, lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_bad_input():
    x = random(4)
    with pytest.raises(ValueError, match="lists of"):
        ops.adamw([x], [], [x], [x], step=1, lr=0.1)
    with pytest.raises(ValueError, match="shapes differ"):
        ops.adamw([x], [random(5)], [x], [x], step=1, lr=0.1)
    with pytest.raises(ValueError, match="shadows has length 2, expected 0 or that of params, 1"):
        ops.adamw([x], [x], [x], [x], step=1, lr=0.1, shadows=[x, x])
    with pytest.raises(ValueError, match="step is 0"):
        ops.adamw([x], [x], [x], [x], step=0, lr=0.1)
    with pytest.raises(ValueError, match="grads is empty"):
        ops.grad_norm([])
