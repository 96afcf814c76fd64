"""What each initialisation scheme does to a model: the table of docs/model.md, measured.

    python -m fastgpt.model.init_study TEXT [--steps 100] [--seeds 3]

TEXT is any text file, read character by character. Every scheme trains the same small GPT (4 layers, 4 heads, 128 wide,
block 64, batch 12, AdamW at 1e-3 after 10 steps of warm-up, betas 0.9 and 0.99, decay 0.1, gradients clipped at norm 1)
on the same batches. Columns:

    stream in, out   root mean square of the residual stream before the first block and after the last, at step 0
    logits           standard deviation of the logits at step 0
    grad first, last root mean square of the gradient of the MLP's first matrix in the first and in the last block, at
    step 0 loss 0, loss N   training loss in nats a character on a fixed batch before training, and the mean over the
    last 10 training steps

All figures are means over the seeds.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fastgpt.errors import UserError
from fastgpt.model import GPT, INIT_SCHEMES, GPTConfig

COLUMNS = ("stream in", "stream out", "logits", "grad first", "grad last", "loss 0", "loss {steps}")
BATCH, BLOCK, WARMUP = 12, 64, 10


def batches(tokens: torch.Tensor, n: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """n random (idx, targets) pairs of shape (BATCH, BLOCK)."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - BLOCK - 1, (n, BATCH, 1), generator=generator)
    places = starts + torch.arange(BLOCK)
    return list(zip(tokens[places], tokens[places + 1], strict=True))


def rms(tensor: torch.Tensor) -> float:
    return tensor.detach().float().square().mean().sqrt().item()


def measure(
    scheme: str, tokens: torch.Tensor, vocab_size: int, steps: int, seed: int, activation: str = "gelu_tanh"
) -> list[float]:
    """One row of the table for one seed.

    Args:
        scheme: one of INIT_SCHEMES.
        tokens: (N,) int64, the text.
        vocab_size: ids are below it.
        steps: training steps, at least 10.
        seed: of the weights and the batches.
        activation: as GPTConfig.

    Returns:
        The figures in the order of COLUMNS.
    """
    torch.manual_seed(seed)
    shape = {"vocab_size": vocab_size, "block_size": BLOCK, "n_layer": 4, "n_head": 4, "n_embd": 128}
    model = GPT(GPTConfig.from_dict(shape | {"init": scheme, "activation": activation}))
    first, *rest = batches(tokens, steps + 1, seed)

    stream: list[float] = []
    hooks = [
        model.h[0].register_forward_pre_hook(lambda _, inputs: stream.append(rms(inputs[0]))),
        model.h[-1].register_forward_hook(lambda _, __, output: stream.append(rms(output))),
    ]
    logits, loss = model(*first)
    loss.backward()
    for hook in hooks:
        hook.remove()
    gradients = [model.get_parameter(f"h.{layer}.mlp.c_fc.weight").grad for layer in (0, 3)]
    row = [*stream, logits.std().item(), *(rms(g) for g in gradients if g is not None), loss.item()]

    decay = [p for p in model.parameters() if p.dim() == 2]
    plain = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
    losses = []
    for idx, targets in rest:
        loss = model(idx, targets)[1]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return [*row, statistics.fmean(losses[-10:])]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table in Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("text", type=Path, help="a text file, at least 1,000 characters")
    parser.add_argument("--steps", type=int, default=100, help="training steps (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds to average over (default %(default)s)")
    parser.add_argument("--activation", default="gelu_tanh", help="the model's activation (default %(default)s)")
    options = parser.parse_args(arguments)
    text = options.text.read_text(encoding="utf-8")
    if len(text) < 1000:
        raise UserError(f"{options.text}: got {len(text)} characters; accepted: at least 1000")
    letters = sorted(set(text))
    codes = np.searchsorted([ord(c) for c in letters], np.frombuffer(text.encode("utf-32-le"), dtype="<u4"))
    tokens = torch.from_numpy(codes)

    print("| scheme | " + " | ".join(COLUMNS).format(steps=options.steps) + " |")
    print("|---" * (1 + len(COLUMNS)) + "|")
    for scheme in INIT_SCHEMES:
        rows = [
            measure(scheme, tokens, len(letters), options.steps, seed, options.activation)
            for seed in range(options.seeds)
        ]
        print(
            f"| {scheme} | "
            + " | ".join(f"{statistics.fmean(column):.3g}" for column in zip(*rows, strict=True))
            + " |"
        )


if __name__ == "__main__":
    main()
