"""The number format of a run, the loss on fixed text, and the bigram baseline on the same tokens."""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from fastgpt.data.shards import Tokens
from fastgpt.model import BigramModel
from fastgpt.train.parallel import Group, shares
from fastgpt.train.sharded import divide_again

ALONE = Group()
BIGRAM_TOKENS = 20_000_000  # counting more changes the baseline's third decimal and takes seconds


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """torch.float32 or torch.bfloat16 for `train.dtype`; auto takes bfloat16 where the chip multiplies it in hardware."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # no public question for it in torch 2.11 to 2.13
    return torch.bfloat16 if probe is not None and probe() else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """bfloat16 autocast on the device, or nothing for float32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


@torch.no_grad()
def mean_loss(
    model: Any,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    device: torch.device,
    dtype: torch.dtype,
    group: Group = ALONE,
) -> float:
    """Mean cross-entropy in nats per token, dropout off, summed in double precision; the model's mode is as before afterwards.

    Args:
        model: called as model(x, y, need_logits=False) -> (logits, loss), loss the mean over the batch.
        batches: pairs of (B, T) int64 tensors; B may differ.
        device: where the model is.
        dtype: torch.float32, or torch.bfloat16 for autocast.
        group: processes that share the batches, each of which must call it.
    """
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for x, y, n_tokens in shares(batches, group):
        with autocast(device, dtype):
            _, loss = model(x.to(device), y.to(device), need_logits=False)
        total += loss.item() * n_tokens
        count += n_tokens
    model.train(was_training)
    divide_again(model)
    if group.world_size > 1:
        total, count = group.sum(torch.tensor([total, count], dtype=torch.float64, device=device)).tolist()
    return total / count


def fit_bigram(tokens: Tokens, vocab_size: int) -> BigramModel:
    """The baseline, counted on the first BIGRAM_TOKENS training tokens."""
    return BigramModel().fit(tokens[:BIGRAM_TOKENS], vocab_size)


def bigram_loss(bigram: BigramModel, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """The baseline's mean loss in nats per token on the same batches that a model is evaluated on."""
    pairs = list(batches)
    return bigram.loss(torch.cat([x.flatten() for x, _ in pairs]), torch.cat([y.flatten() for _, y in pairs]))


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Nats per token as bits per byte of text, which compares across tokenizers."""
    return loss / math.log(2) / bytes_per_token
