"""A race to a validation loss on tiny shakespeare's characters: nanoGPT's CPU run in plain torch against fastgpt, on one machine.

    python -m benchmarks.race_loss --data tinyshakespeare.txt
    python -m benchmarks.race_loss --data tinyshakespeare.txt --mark 1.55      # ours alone, to a lower loss: race_mark.py

The plain side is nanoGPT's configuration for a CPU (its README: 4 layers, 4 heads, 128 wide, block 64, batch 12, 2,000 steps, fp32,
no compiling) on plain_gpt.py with nanoGPT's starting weights, random crops, schedule and fused AdamW. Its last validation loss is
the mark. Ours is the same model with what the library offers: xavier weights, every block once an epoch, bf16 where the chip
multiplies it, half the steps at twice the learning rate. Nothing of it was chosen by the validation loss of this race's text.

Both train on the first 90 % of the text and are evaluated by one function on all of the rest, in fp32. They take turns, SLICE
steps at a time, each on its own clock: batches, forward, backward, clipping and update count, evaluation does not on either side.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastgpt.data.loader import EvalBatches, Loader
from fastgpt.model import GPT, GPTConfig
from fastgpt.tokenizer import CharTokenizer
from fastgpt.train.evaluate import autocast, choose_dtype, mean_loss
from fastgpt.train.heap import keep_pages
from fastgpt.train.optimizer import build_optimizer, clip_scale
from fastgpt.train.schedule import Schedule

from . import record
from .plain_gpt import PlainGPT, plain_optimizer
from .race_mark import run_to

BLOCK, BATCH, SLICE, EVAL_EVERY = 64, 12, 50, 100
STEPS, RATE, WARMUP = 2000, 1e-3, 100  # nanoGPT's
OUR_STEPS, OUR_RATE = 1000, 2e-3
CPU = torch.device("cpu")


class Runner:
    """One side: its model, optimizer, loader and clock."""

    def __init__(
        self, name: str, model: Any, optimizer: Any, loader: Loader, schedule: Schedule, dtype: torch.dtype
    ) -> None:
        self.name, self.model, self.optimizer, self.loader = name, model, optimizer, loader
        self.schedule, self.dtype = schedule, dtype
        self.step, self.seconds = 0, 0.0
        self.losses: list[tuple[int, float, float]] = []  # steps, seconds, validation loss

    @property
    def done(self) -> bool:
        return self.step >= (self.schedule.max_steps or 0)

    def run(self, steps: int, update: Callable[["Runner"], None]) -> None:
        """Train for some steps on this side's clock."""
        began = time.perf_counter()
        for _ in range(steps):
            for group in self.optimizer.param_groups:
                group["lr"] = self.schedule.at(self.step)
            update(self)
            self.step += 1
        self.seconds += time.perf_counter() - began

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.loader.batch(self.step, 0, 1)


def plain_update(side: Runner) -> None:
    """One step as nanoGPT takes it."""
    _, loss = side.model(*side.batch())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(side.model.parameters(), 1.0)
    side.optimizer.step()
    side.optimizer.zero_grad(set_to_none=True)


def our_update(side: Runner) -> None:
    """One step as fastgpt's trainer takes it."""
    with autocast(CPU, side.dtype):
        _, loss = side.model(*side.batch(), need_logits=False)
    loss.backward()
    side.optimizer.step(grad_scale=clip_scale(side.optimizer.grad_norm(), 1.0))
    side.optimizer.zero_grad(set_to_none=True)


class _Plain(torch.nn.Module):
    """The plain model under the signature that `mean_loss` calls."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, y: torch.Tensor, need_logits: bool = True) -> Any:
        return self.model(x, y)


def race(text: str, seed: int) -> dict[str, Any]:
    """Run both sides to their ends; the record."""
    tokenizer = CharTokenizer.train(text)
    ids = tokenizer.encode_numpy(text)
    train, held_out = ids[: int(0.9 * len(ids))], ids[int(0.9 * len(ids)) :]
    shape: dict[str, Any] = {
        "vocab_size": tokenizer.n_vocab,
        "block_size": BLOCK,
        "n_layer": 4,
        "n_head": 4,
        "n_embd": 128,
        "bias": False,
        "activation": "gelu",
    }
    options: dict[str, Any] = {"weight_decay": 0.1, "betas": (0.9, 0.99)}

    torch.manual_seed(seed)
    plain_model = PlainGPT(GPTConfig(**shape, init="gpt2"))
    plain_model.load_state_dict(GPT(GPTConfig(**shape, init="gpt2")).state_dict())
    plain = Runner(
        "nanoGPT's run in plain torch",
        plain_model,
        plain_optimizer(plain_model, learning_rate=RATE, **options),
        Loader(train, block_size=BLOCK, batch_size=BATCH, seed=seed, order="random"),
        Schedule(RATE, RATE / 10, WARMUP, STEPS),
        torch.float32,
    )
    model = GPT(GPTConfig(**shape, init="xavier"))
    ours = Runner(
        "fastgpt",
        model,
        build_optimizer(model, learning_rate=OUR_RATE, **options),
        Loader(train, block_size=BLOCK, batch_size=BATCH, seed=seed, order="shuffle"),
        Schedule(OUR_RATE, OUR_RATE / 10, WARMUP, OUR_STEPS),
        choose_dtype("auto", CPU),
    )
    sides = [(plain, plain_update, _Plain(plain_model)), (ours, our_update, model)]
    batches = list(EvalBatches(held_out, BLOCK, 64, len(held_out)))
    while not all(side.done for side, _, _ in sides):
        for side, update, called in sides:
            if side.done:
                continue
            side.run(SLICE, update)
            if side.step % EVAL_EVERY == 0:
                loss = mean_loss(called, batches, CPU, torch.float32)
                side.losses.append((side.step, side.seconds, loss))
                print(
                    f"{side.name}: step {side.step}, {side.seconds:.1f} s, validation loss {loss:.4f}", file=sys.stderr
                )
    mark = plain.losses[-1][2]
    reached = next((seconds for _, seconds, loss in ours.losses if loss <= mark), None)
    return {
        "mark": mark,
        "plain_seconds": plain.seconds,
        "our_seconds": reached,
        "speedup": plain.seconds / reached if reached else None,
        "our_last_loss": ours.losses[-1][2],
        "dtype": str(ours.dtype).removeprefix("torch."),
        "curves": {side.name: side.losses for side, _, _ in sides},
    }


def main() -> int:
    """Run the race, print its outcome and write it beside the other results."""
    parser = argparse.ArgumentParser(description="Race nanoGPT's CPU run to its own validation loss.")
    parser.add_argument("--data", type=Path, required=True, help="tiny shakespeare, or any text")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--mark", type=float, default=None, help="a validation loss: ours alone, until it is reached")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder for the result; the other benchmarks' by default"
    )
    arguments = parser.parse_args()
    keep_pages()
    text = arguments.data.read_text(encoding="utf-8")
    facts = {"date": record.now(), "machine": record.machine(), "versions": record.versions(), "cases": []}
    out = arguments.out or record.default_out()
    if arguments.mark is not None:
        found = run_to(text, arguments.mark, arguments.seed)
        record.write(out, {"benchmark": "race_mark", **facts, **found})
        took = (
            f"{found['our_seconds']:.1f} s" if found["our_seconds"] else f"not reached ({found['our_last_loss']:.4f})"
        )
        print(f"mark {arguments.mark:.4f}: fastgpt {took}, {found['tokens']:,} tokens")
        return 0
    result = race(text, arguments.seed)
    record.write(out, {"benchmark": "race_loss", **facts, **result})
    ours = f"{result['our_seconds']:.1f} s, {result['speedup']:.2f} x" if result["our_seconds"] else "not reached"
    print(f"mark {result['mark']:.4f}: plain torch {result['plain_seconds']:.1f} s; fastgpt {ours}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
