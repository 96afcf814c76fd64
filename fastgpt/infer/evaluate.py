"""How well a model predicts a text: loss in nats a token, perplexity, bits a byte.

A text longer than the context is read in windows of block_size tokens that overlap: each token is predicted once, with at least
block_size - stride tokens before it (at the start of the text, those there are). A smaller stride gives each token more context, a
lower loss, and more work: block_size / stride passes over the text.

    loss           - sum of log p(token) / tokens          depends on the tokenizer
    perplexity     exp(loss)                               the same
    bits per byte  - sum of log2 p(token) / bytes          compares across tokenizers

The first token is predicted from the end-of-text token; a tokenizer without one (characters) leaves the first token out, and its
bytes too.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastgpt.errors import UserError
from fastgpt.model import GPT

LOGITS = 2**24  # at most so many at a time


@dataclass(frozen=True)
class TextLoss:
    """What `evaluate_text` measured: mean loss in nats a token, perplexity, bits a byte, and over how much text."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int

    def to_dict(self) -> dict[str, float]:
        """The same as a dictionary."""
        return asdict(self)


def _windows(n: int, first: int, block_size: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, scored): x is ids[begin:end], y one further, and y counts from place `scored` of the window on."""
    end = first - 1
    begin = max(0, min(end + stride, n - 1) - block_size) if first > 1 else 0
    while end < n - 1:
        last = min(begin + block_size, n - 1)
        yield begin, last, end - begin
        end = last
        begin = max(begin + 1, min(end + stride, n - 1) - block_size)


@torch.no_grad()
def token_log_probs(
    model: GPT, ids: Sequence[int] | torch.Tensor, first: int = 1, *, stride: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The log probability of each of ids[first:], given all before it that the context holds.

    Args:
        model: a GPT; in evaluation mode for the call.
        ids: (n,) token ids.
        first: the first to be scored, at least 1.
        stride: tokens that a window scores, at most block_size; None: half of it.

    Returns:
        (log_probs, greedy), each (n - first,): float32 in nats, and whether the token was the most probable one.

    Raises:
        ValueError: first or stride is out of its range.
    """
    ids = torch.as_tensor(ids, dtype=torch.int64)
    block_size, n = model.config.block_size, len(ids)
    stride = max(block_size // 2, 1) if stride is None else stride
    if not 1 <= stride <= block_size:
        raise ValueError(f"stride is {stride}; accepted is 1 to block_size = {block_size}")
    if first < 1:
        raise ValueError(f"first is {first}; accepted is at least 1: the first token has nothing before it")
    log_probs, greedy = torch.empty(max(n - first, 0)), torch.empty(max(n - first, 0), dtype=torch.bool)
    was_training = model.training
    model.eval()
    windows = list(_windows(n, first, block_size, stride))
    most = max(LOGITS // (block_size * model.config.vocab_size), 1)
    try:
        while windows:
            length = windows[0][1] - windows[0][0]
            group = [w for w in windows[:most] if w[1] - w[0] == length]
            group = group if group == windows[: len(group)] else windows[:1]
            windows = windows[len(group) :]
            x = torch.stack([ids[begin:end] for begin, end, _ in group]).to(model.device)
            logits, _ = model(x, all_logits=True)  # (B, T, V)
            scores = torch.log_softmax(logits.float(), -1)
            for row, (begin, end, scored) in enumerate(group):
                targets = ids[begin + scored + 1 : end + 1].to(model.device)
                here = scores[row, scored:]
                place = slice(begin + scored + 1 - first, end + 1 - first)
                log_probs[place] = here.gather(-1, targets[:, None])[:, 0].cpu()
                greedy[place] = (here.argmax(-1) == targets).cpu()
    finally:
        model.train(was_training)
    return log_probs, greedy


def evaluate_text(model: GPT, tokenizer: Any, text: str, *, stride: int | None = None) -> TextLoss:
    """Loss, perplexity and bits a byte of a text.

    Args:
        model: a GPT.
        tokenizer: the one it was trained with.
        text: what to predict.
        stride: as `token_log_probs`.

    Raises:
        UserError: the tokenizer cannot encode the text, or the text is too short to predict anything.

    Example:
        >>> model, tokenizer = load_run("runs/shakespeare")  # doctest: +SKIP
        >>> evaluate_text(model, tokenizer, "To be, or not to be").bits_per_byte  # doctest: +SKIP
        2.31
    """
    try:
        ids = tokenizer.encode_ordinary(text) if hasattr(tokenizer, "encode_ordinary") else tokenizer.encode(text)
    except ValueError as error:
        raise UserError(f"the tokenizer cannot encode the text: {error}") from error
    n_bytes = len(text.encode("utf-8", "replace"))
    if tokenizer.eot_token is not None:
        ids = [tokenizer.eot_token, *ids]
    elif ids:
        n_bytes -= len(tokenizer.decode_bytes(ids[:1]))
    if len(ids) < 2:
        raise UserError("the text is too short: there is no token to predict")
    log_probs, _ = token_log_probs(model, ids, stride=stride)
    total, n_tokens = -log_probs.double().sum().item(), len(ids) - 1
    loss = total / n_tokens
    return TextLoss(loss, math.exp(min(loss, 700.0)), total / math.log(2) / n_bytes, n_tokens, n_bytes)
