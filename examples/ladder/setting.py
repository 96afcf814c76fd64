"""What every rung of the ladder shares: tiny shakespeare by characters, random batches, AdamW, the loss on all held-out text.

The setting is that of Andrej Karpathy's lecture "Let's build GPT: from scratch, in code, spelled out": 32 sequences of 8 characters a
step, 32 numbers for each character, 5000 steps at a learning rate of 1e-3. The loss is the mean over all of the
held-out tenth of the text; on the way it is measured on 16,384 characters of it.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastgpt.data.corpora import load_corpus
from fastgpt.data.loader import EvalBatches, Loader
from fastgpt.tokenizer import CharTokenizer
from fastgpt.train.optimizer import build_optimizer

BLOCK_SIZE, BATCH_SIZE, N_EMBD, N_HEAD, N_LAYER = 8, 32, 32, 4, 3
STEPS, LEARNING_RATE = 5000, 1e-3


def options(description: str) -> argparse.Namespace:
    """The command line of a rung."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", default="shakespeare", help="a text file, or 'shakespeare' to download it once")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the rung's own)")
    parser.add_argument("--out", help="add the results to this JSON file")
    return parser.parse_args()


class Text:
    """The text as ids: `loader` draws training batches, `val` and `train` are fixed batches for measuring.

    Args:
        source: a file, or "shakespeare".
        block_size: characters in a sequence.
    """

    def __init__(self, source: str, block_size: int = BLOCK_SIZE) -> None:
        corpus = load_corpus(source, 0.1)
        self.tokenizer = CharTokenizer.train("".join(corpus.train + corpus.val))
        train, val = (self.tokenizer.encode_numpy("".join(part)) for part in (corpus.train, corpus.val))
        self.loader = Loader(train, block_size, BATCH_SIZE, seed=1337, order="random")
        self.val = EvalBatches(val, block_size, 1024, len(val))
        self.val_part = EvalBatches(val, block_size, 1024, 16384)
        self.train = EvalBatches(train, block_size, 1024, 16384, what="training")
        self.vocab_size = self.tokenizer.n_vocab


@torch.no_grad()
def measure(model: torch.nn.Module, batches: EvalBatches) -> float:
    """The mean loss on fixed batches; all but the last are of one size."""
    return sum(model(x, y)[1].item() * y.numel() for x, y in batches) / batches.n_tokens


def fit(
    text: Text,
    make: Callable[[], torch.nn.Module],
    *,
    steps: int = STEPS,
    learning_rate: float = LEARNING_RATE,
    points: int = 10,
) -> dict:
    """Train a model on text and measure it.

    Args:
        text: the ids.
        make: makes a model with forward(x, y) -> (logits, loss).
        steps, learning_rate: length and step size.
        points: measurements on the way.

    Returns:
        val_loss, train_loss, n_params, seconds, and curve: [step, training loss, validation loss] for each measurement.
    """
    torch.manual_seed(1337)
    model = make()
    optimizer = build_optimizer(model, learning_rate=learning_rate, weight_decay=0.01, betas=(0.9, 0.999))
    curve, started = [], time.monotonic()
    for step in range(steps + 1):
        if step % max(steps // points, 1) == 0 or step == steps:
            losses = [measure(model, part) for part in (text.train, text.val if step == steps else text.val_part)]
            curve.append([step, *losses])
        if step == steps:
            break
        _, loss = model(*text.loader.batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    n_params = sum(p.numel() for p in model.parameters())
    return {
        "val_loss": curve[-1][2],
        "train_loss": curve[-1][1],
        "n_params": n_params,
        "seconds": round(time.monotonic() - started, 1),
        "curve": curve,
    }


def record(name: str, result: dict, out: str | None) -> None:
    """Print a result, and add it to a JSON file where one is given."""
    print(
        f"{name}: validation loss {result['val_loss']:.4f}, {result['n_params']:,} parameters, {result['seconds']} s",
        flush=True,
    )
    if out:
        path = Path(out)
        results = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(results | {name: result}, indent=1) + "\n")
