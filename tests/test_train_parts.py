"""Schedule, optimizer, metrics, plot and evaluation, each against its own definition."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.errors import UserError
from fastgpt.model import GPT, GPTConfig
from fastgpt.train.evaluate import bigram_loss, bits_per_byte, fit_bigram, mean_loss
from fastgpt.train.metrics import Metrics, plot_losses
from fastgpt.train.optimizer import AdamW, build_optimizer, clip_scale
from fastgpt.train.plan import Budget
from fastgpt.train.progress import duration
from fastgpt.train.schedule import Schedule


def nanogpt_rate(step, peak, floor, warmup, decay):
    """nanoGPT's get_lr, written out from its definition."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if step > decay:
        return floor
    return floor + 0.5 * (1 + math.cos(math.pi * (step - warmup) / (decay - warmup))) * (peak - floor)


def test_schedule_is_nanogpts():
    schedule = Schedule(1e-3, 1e-4, 100, 2000)
    for step in (0, 1, 50, 99, 100, 101, 700, 1500, 1999, 2000, 2001, 10**6):
        assert schedule.at(step) == pytest.approx(nanogpt_rate(step, 1e-3, 1e-4, 100, 2000), rel=1e-12)


@settings(deadline=None)
@given(st.integers(0, 50), st.integers(1, 200), st.integers(0, 400))
def test_schedule_stays_between_zero_and_peak_and_ends_at_the_floor(warmup, max_steps, step):
    schedule = Schedule(1.0, 0.1, warmup, max_steps)
    assert 0.0 < schedule.at(step) <= 1.0
    assert schedule.at(max(max_steps, warmup)) == pytest.approx(0.1)
    if warmup <= step:
        assert schedule.at(step + 1) <= schedule.at(step)
    elif step + 1 < warmup:
        assert schedule.at(step + 1) > schedule.at(step)


def test_schedule_without_a_known_length_holds_the_peak():
    schedule = Schedule(1.0, 0.1, 10, None)
    assert [schedule.at(step) for step in (10, 1000)] == [1.0, 1.0]
    assert schedule.at(4) == Schedule(1.0, 0.1, 10, 500).at(4)


def test_decay_is_decoupled_and_on_matrices_only():
    model = GPT(GPTConfig(vocab_size=11, block_size=4, n_layer=1, n_head=1, n_embd=8, bias=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    optimizer = build_optimizer(model, learning_rate=0.1, weight_decay=0.5, betas=(0.9, 0.99))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        # with a zero gradient the update is the decay alone: w (1 - lr * weight_decay)
        expected = 0.95 if parameter.dim() >= 2 else 1.0
        assert torch.allclose(parameter, torch.full_like(parameter, expected)), name
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_optimizer_is_torchs_with_clipping():
    """Ten steps with clipped gradients end where torch's AdamW and clip_grad_norm_ end."""
    models, torch_norms, norms = [], [], []
    for ours in (True, False):
        torch.manual_seed(1)
        # without biases: the key bias has a gradient of rounding noise alone, and Adam makes steps of full size of it
        model = GPT(GPTConfig(vocab_size=11, block_size=4, n_layer=1, n_head=1, n_embd=8, bias=False))
        groups = build_optimizer(model, learning_rate=0.1, weight_decay=0.5, betas=(0.8, 0.99))
        optimizer = groups if ours else torch.optim.AdamW([dict(group) for group in groups.param_groups])
        for step in range(10):
            x = torch.randint(0, 11, (2, 4), generator=torch.Generator().manual_seed(step))
            model(x, x)[1].backward()
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / (step + 1)
            if ours:
                norms.append(optimizer.grad_norm())
                optimizer.step(grad_scale=clip_scale(norms[-1], 0.3))
            else:
                torch_norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3).item())
                optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    assert max(norms) > 0.3  # clipping took place
    assert norms == pytest.approx(torch_norms, rel=1e-4)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_optimizer_state_dict_round_trip():
    weight = torch.nn.Parameter(torch.ones(3, 2))
    first, again = AdamW([weight], lr=0.1), AdamW([weight], lr=0.1)
    weight.grad = torch.arange(6.0).view(3, 2)
    first.step()
    again.load_state_dict(first.state_dict())
    assert again.steps == 1
    for key, value in first.moments(weight).items():
        assert torch.equal(value, again.moments(weight)[key])


@pytest.mark.parametrize(
    ("norm", "limit", "scale"), [(4.0, 1.0, 0.25), (0.5, 1.0, 1.0), (4.0, 0.0, 1.0), (0.0, 1.0, 1.0)]
)
def test_clip_scale(norm, limit, scale):
    assert clip_scale(norm, limit) == scale


def line(step, loss):
    return {"step": step, "train_loss": loss, "val_loss": loss + 0.1, "bigram_val_loss": 2.0}


def test_metrics_survive_a_cut_last_line_and_forget_what_a_resume_repeats(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    for step in (0, 10, 20):
        metrics.append(line(step, 3.0 - step / 10))
    with open(path, "a") as file:
        file.write('{"step": 30, "train_lo')
    again = Metrics(path)
    assert again.lines == metrics.lines
    again.keep_until(10)
    assert [json.loads(text)["step"] for text in path.read_text().splitlines()] == [0, 10]


def test_metrics_with_a_damaged_line_in_the_middle(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0\n{"step": 1}\n')
    with pytest.raises(UserError, match="line 1 is not JSON"):
        Metrics(path)


def test_plot_draws_both_losses_and_the_baseline(tmp_path):
    matplotlib_image = pytest.importorskip("matplotlib.image")
    lines = [line(step, 3.0 - step / 30) for step in range(0, 50, 10)]
    plot_losses(lines, tmp_path / "loss.png", "a run")
    image = matplotlib_image.imread(tmp_path / "loss.png")
    assert image.shape[0] >= 400
    assert image.shape[1] >= 600
    colours = {tuple(np.round(pixel[:3] * 255).astype(int)) for row in image for pixel in row}
    for colour in ((0x44, 0x77, 0xAA), (0xEE, 0x66, 0x77), (0x77, 0x77, 0x77)):
        assert colour in colours
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_mean_loss_weighs_tokens_not_batches_and_keeps_the_mode():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=7, block_size=4, n_layer=1, n_head=1, n_embd=8, dropout=0.5)).train()
    x, y = torch.randint(0, 7, (2, 5, 4))
    whole = mean_loss(model, [(x, y)], torch.device("cpu"), torch.float32)
    parts = mean_loss(model, [(x[:1], y[:1]), (x[1:], y[1:])], torch.device("cpu"), torch.float32)
    assert parts == pytest.approx(whole, rel=1e-6)
    assert model.training
    logits, _ = model.eval()(x, all_logits=True)
    expected = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), y.flatten())
    assert whole == pytest.approx(expected.item(), rel=1e-6)


def test_bigram_baseline_learns_pairs():
    tokens = np.array([0, 1, 2] * 400, dtype=np.uint16)
    batches = [(torch.tensor([[0, 1], [2, 0]]), torch.tensor([[1, 2], [0, 1]]))]
    assert bigram_loss(fit_bigram(tokens, 3), batches) < 0.05
    wrong = [(torch.tensor([[0, 0]]), torch.tensor([[2, 0]]))]
    assert bigram_loss(fit_bigram(tokens, 3), wrong) > 3.0


def test_bits_per_byte():
    assert bits_per_byte(math.log(2), 1.0) == pytest.approx(1.0)
    assert bits_per_byte(math.log(256), 2.0) == pytest.approx(4.0)


def test_durations():
    assert [duration(s) for s in (0, 9.6, 61, 3600, 36061)] == ["0:00", "0:10", "1:01", "1:00:00", "10:01:01"]


def test_budget_divides_what_is_left_by_a_step():
    budget = Budget(100.0, None)
    budget.eval_s = 1.0
    enough = [budget.add(step_s, 0.0) for step_s in (9.0, 9.0, 9.0, *[1.0] * 5)]
    assert enough == [False] * 7 + [True]  # the first three steps do not count; then 5 steps and 5 s are there
    # 100 - 20 s left: a tenth of it, 8 evaluations of 1 s, and 72 steps of 1 s
    assert budget.plan(step=8, elapsed_s=20.0) == (80, 10)
    budget.eval_s = 0.1  # cheap ones are no more than ten
    assert budget.plan(step=8, elapsed_s=20.0) == (87, 9)
    budget.eval_s = 20.0  # dear ones are no fewer than two
    assert budget.plan(step=8, elapsed_s=20.0) == (48, 24)
    assert budget.plan(step=8, elapsed_s=99.0) == (8, 4)
    fixed = Budget(100.0, 10)
    fixed.eval_s = 10.0
    assert [fixed.add(1.0, 0.0) for _ in range(8)][-1]
    assert fixed.plan(step=8, elapsed_s=20.0) == (48, 10)  # a step costs 1 s and a tenth of an evaluation


def test_a_used_up_budget_ends_the_timing():
    for every in (None, 7):
        budget = Budget(5.0, every)
        assert budget.add(6.0, 6.0)
        assert budget.plan(1, 6.0)[0] == 1
        early = Budget(5.0, every)  # not one step timed yet
        assert not early.add(0.1, 0.1)
        assert early.plan(1, 0.1)[0] == 1
