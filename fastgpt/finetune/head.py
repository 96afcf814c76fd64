"""A GPT with a linear head on its features: class logits or one number for a text.

    features = norm(x_L)                    (B, T, C), the input of a language model's head
    pooled   = the last token's, or the mean of all tokens'
    output   = dropout(pooled) W^T + b      (B, K)

Texts of a batch are padded on the right: attention is causal, so no token of a text sees the padding after it, and pooling
leaves it out. A text's output is therefore the same in every batch, up to the last bits of the matrix products.

One file holds both parts and what they mean, so that they cannot come from two moments of a training.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastgpt import ops
from fastgpt.errors import UserError
from fastgpt.model import GPT, GPTConfig
from fastgpt.train.files import explain_writing, replace_file

POOLINGS = ("mean", "last")
FORMAT = "fastgpt-head"
WEIGHTS = "head.safetensors"


class HeadedGPT(torch.nn.Module):
    """A GPT whose language-model head gives way to a linear one over pooled features.

    Args:
        gpt: the pretrained model; used as it is, not copied.
        n_outputs: K, classes or 1 for a number.
        pooling: "mean" or "last".

    Raises:
        ValueError: another pooling, or n_outputs below 1.

    Example:
        >>> model = HeadedGPT(gpt, 2)  # doctest: +SKIP
        >>> model(ids, lengths).shape  # (B, T) and (B) int64  # doctest: +SKIP
        torch.Size([8, 2])
    """

    def __init__(self, gpt: GPT, n_outputs: int, pooling: str = "mean") -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling: got {pooling!r}; accepted: {', '.join(POOLINGS)}")
        if n_outputs < 1:
            raise ValueError(f"n_outputs: got {n_outputs}; accepted: at least 1")
        self.gpt, self.pooling = gpt, pooling
        self.head = torch.nn.Linear(gpt.config.n_embd, n_outputs, device=gpt.device)
        torch.nn.init.normal_(self.head.weight, std=0.02)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, idx: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """(B, K) fp32 outputs of (B, T) int64 ids, text b in the first lengths[b] of its row; lengths (B) int64, at least 1."""
        features = self.gpt.features(idx)  # (B, T, C)
        if self.pooling == "last":
            pooled = features[torch.arange(len(idx), device=idx.device), lengths - 1]  # (B, C)
        else:
            inside = torch.arange(idx.shape[1], device=idx.device) < lengths[:, None]  # (B, T)
            pooled = (features.float() * inside[..., None]).sum(1) / lengths[:, None]  # (B, C), summed in fp32
        pooled = ops.dropout(pooled, self.gpt.config.dropout, self.training)
        with torch.autocast(idx.device.type, enabled=False):
            return self.head(pooled.float())


def save_headed(model: HeadedGPT, path: Path, meaning: dict[str, Any]) -> None:
    """Write the weights of both parts and `meaning` (what JSON holds: task, labels, scale) to one file, atomically.

    Raises:
        UserError: it cannot be written.
    """
    metadata = {
        "format": FORMAT,
        "config": json.dumps(model.gpt.config.to_dict()),
        "head": json.dumps({"n_outputs": model.head.out_features, "pooling": model.pooling}),
        "meaning": json.dumps(meaning),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with explain_writing(path):
        replace_file(path, lambda temporary: save_file(tensors, temporary, metadata))


def load_headed(path: Path, device: str | torch.device = "cpu") -> tuple[HeadedGPT, dict[str, Any]]:
    """(model in evaluation mode, meaning) as `save_headed` wrote them.

    Raises:
        UserError: no such file, one of another kind, or a damaged one.
    """
    if not path.is_file():
        raise UserError(
            f"{path.parent}: has no {path.name}; accepted is a run folder of fastgpt finetune --task classify or regress"
        )
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(f"{path}: its format is {metadata.get('format')!r}; accepted is {FORMAT!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        with torch.device("meta"):
            model = HeadedGPT(GPT(GPTConfig.from_dict(json.loads(metadata["config"]))), **json.loads(metadata["head"]))
        model.load_state_dict(tensors, assign=True)
        meaning = json.loads(metadata["meaning"])
    except (SafetensorError, KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: damaged, or not a file of fastgpt finetune: {error}") from error
    return model.eval(), meaning
