"""Drop-in forms of torch.nn.Linear and torch.nn.LinearCrossEntropyLoss, on `ops.linear` and `ops.linear_cross_entropy`."""

from typing import Any

import torch
import torch.nn.functional as F

from fastgpt import ops
from fastgpt.nn.fallback import is_small_weight, log_fallback
from fastgpt.ops.transformer_block import covers

FEW_ROWS = 8  # up to here the CPU engine reads a linear layer's weights once and packs nothing


def reads_few_rows(x: torch.Tensor) -> bool:
    """Whether a linear layer of x is faster in the CPU engine than in torch: float32, a few rows, no gradients. Other products stay
    torch's; of bfloat16 the engine's are slower for 8 rows, and for many rows neither is faster."""
    return (
        x.dtype == torch.float32
        and 0 < x.numel() <= FEW_ROWS * x.shape[-1]
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and covers(x)
    )


class Linear(torch.nn.Linear):
    """torch.nn.Linear(in_features, out_features, bias=True): up to 8 float32 rows without gradients on `ops.linear`, as in a step of
    generation on the CPU; other calls are torch's product, than which ours is no faster.

    Args of forward:
        input: (..., in_features) to (..., out_features), in the parameters' dtype.

    Raises:
        RuntimeError: shapes or dtypes that do not fit, torch's own.

    Example:
        >>> Linear(4, 2)(torch.zeros(3, 4)).shape
        torch.Size([3, 2])
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if (
            reads_few_rows(input)
            and self.weight.dtype == input.dtype
            and input.shape[-1] == self.in_features
            and not is_small_weight(self.weight)
        ):
            return ops.linear(input, self.weight, self.bias)
        return super().forward(input)


class LinearCrossEntropyLoss(torch.nn.Module):
    """torch.nn.LinearCrossEntropyLoss, a last projection and its loss, on `ops.linear_cross_entropy`: the logits are never whole in
    memory.

    Args:
        in_features: width C of the input.
        num_classes: V.
        out_features, bias, weight, reduction="none", class probabilities as the target: as in torch, computed by torch's linear and
            cross_entropy, which have the logits.
        reduction: "mean" over the targets that count, or "sum".
        ignore_index: the target that does not count; -100 where None.
        label_smoothing: in [0, 1].
        options: accepted as torch's, without effect: chunks are of the op's own size.
        device, dtype: of the projection's weight.

    Args of forward:
        input: (N, C) or (C). target: (N) or (), int64.

    Returns:
        A scalar; float32 for half types. `linear` is the projection, so the state_dict's keys are torch's: linear.weight (V, C).

    Raises:
        RuntimeError: label_smoothing or weight that does not fit, as torch. ValueError, RuntimeError: input and target that do not.

    Example:
        >>> LinearCrossEntropyLoss(8, 5)(torch.zeros(3, 8), torch.tensor([0, 1, 4])).shape
        torch.Size([])
    """

    weight: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: torch.Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
    ) -> None:
        super().__init__()
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"weight: got shape {tuple(weight.shape)}; accepted: {(num_classes,)}")
        if not 0.0 <= label_smoothing <= 1.0:
            raise RuntimeError(f"label_smoothing: got {label_smoothing}; accepted: 0 to 1")
        self.num_classes, self.out_features, self.reduction = num_classes, tuple(out_features), reduction
        self.ignore_index, self.label_smoothing, self.options = ignore_index, label_smoothing, options
        self.register_buffer("weight", weight)
        outputs = torch.Size((num_classes, *out_features)).numel()
        self.linear = torch.nn.Linear(in_features, outputs, bias=bias, device=device, dtype=dtype)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        ignored = -100 if self.ignore_index is None else self.ignore_index
        plain = self.linear.bias is None and self.weight is None and not self.out_features
        if plain and self.reduction != "none" and not target.is_floating_point():
            try:
                return ops.linear_cross_entropy(
                    input[None] if input.dim() == 1 else input,
                    self.linear.weight,
                    target[None] if target.dim() == 0 else target,
                    ignore_index=ignored,
                    reduction=self.reduction,
                    label_smoothing=self.label_smoothing,
                )
            except (TypeError, ValueError):
                pass  # torch's linear and cross_entropy raise their own error, or take it
        else:
            log_fallback(
                "LinearCrossEntropyLoss with a bias, class weights, several outputs, probabilities or no reduction"
            )
        logits = self.linear(input)
        if self.out_features:
            logits = logits.view(*input.shape[:-1], self.num_classes, *self.out_features)
        return F.cross_entropy(
            logits,
            target,
            self.weight,
            ignore_index=ignored,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.linear.in_features}, num_classes={self.num_classes}, out_features={self.out_features},"
            f" bias={self.linear.bias is not None}, reduction={self.reduction}, ignore_index={self.ignore_index},"
            f" label_smoothing={self.label_smoothing}, options={self.options}"
        )
