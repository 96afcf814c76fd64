"""Drop-in forms of torch.nn's LayerNorm, RMSNorm, Softmax, LogSoftmax, ReLU, Sigmoid, Tanh, GELU, SiLU, Dropout, Embedding and
CrossEntropyLoss, computed by fastgpt.ops.

Each class derives from torch's class of the same name: constructor arguments, parameters, state_dict keys and repr are
torch's own, an `isinstance` check against torch.nn still holds, and a state_dict moves either way. Only `forward`
differs.

What the ops do not do goes to torch's own forward, and says so once a process through the logger "fastgpt":
    ReLU(inplace=True), SiLU(inplace=True), Dropout(inplace=True)  torch's in-place kernel
    Embedding with max_norm, scale_grad_by_freq or sparse
    CrossEntropyLoss with class weights or with class probabilities as the target
    Softmax and LogSoftmax without a `dim`
    input that an op refuses: torch computes it (relu of integers), or raises its own error (a wrong shape)
"""

from typing import Any

import torch

from fastgpt import ops
from fastgpt.nn.fallback import log_fallback as _log_fallback
from fastgpt.nn.fallback import or_torch


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm(normalized_shape, eps=1e-5, elementwise_affine=True, bias=True) on `ops.layer_norm`.

    Args of forward:
        input: (..., *normalized_shape), fp32, bf16 or another floating dtype that the op takes.

    Returns:
        A tensor of the input's shape and dtype; mean and variance are accumulated in fp32.

    Example:
        >>> LayerNorm(4)(torch.arange(8.0).view(2, 4)).shape
        torch.Size([2, 4])
    """

    @or_torch(torch.nn.LayerNorm.forward, "LayerNorm")
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return ops.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm(normalized_shape, eps=None, elementwise_affine=True) on `ops.rms_norm`.

    Args of forward:
        x: (..., *normalized_shape), fp32, bf16 or another floating dtype that the op takes.

    Returns:
        A tensor of the input's shape and dtype; the mean square is accumulated in fp32.

    Example:
        >>> RMSNorm(4)(torch.arange(8.0).view(2, 4)).shape
        torch.Size([2, 4])
    """

    @or_torch(torch.nn.RMSNorm.forward, "RMSNorm")
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class Softmax(torch.nn.Softmax):
    """torch.nn.Softmax(dim) on `ops.softmax`; any shape, the input's dtype.

    Example:
        >>> Softmax(dim=-1)(torch.zeros(1, 2))
        tensor([[0.5000, 0.5000]])
    """

    @or_torch(torch.nn.Softmax.forward, "Softmax")
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.dim is None:
            _log_fallback("Softmax without a dim")
            return super().forward(input)
        return ops.softmax(input, self.dim)


class LogSoftmax(torch.nn.LogSoftmax):
    """torch.nn.LogSoftmax(dim) on `ops.log_softmax`; any shape, the input's dtype.

    Example:
        >>> LogSoftmax(dim=-1)(torch.zeros(1, 2))
        tensor([[-0.6931, -0.6931]])
    """

    @or_torch(torch.nn.LogSoftmax.forward, "LogSoftmax")
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.dim is None:
            _log_fallback("LogSoftmax without a dim")
            return super().forward(input)
        return ops.log_softmax(input, self.dim)


class ReLU(torch.nn.ReLU):
    """torch.nn.ReLU(inplace=False) on `ops.relu`; any shape, the input's dtype.

    Example:
        >>> ReLU()(torch.tensor([-1.0, 2.0]))
        tensor([0., 2.])
    """

    @or_torch(torch.nn.ReLU.forward, "ReLU")
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.inplace:
            _log_fallback("ReLU(inplace=True)")
            return super().forward(input)
        return ops.relu(input)


class Sigmoid(torch.nn.Sigmoid):
    """torch.nn.Sigmoid() on `ops.sigmoid`; any shape, the input's dtype.

    Example:
        >>> Sigmoid()(torch.tensor([0.0]))
        tensor([0.5000])
    """

    @or_torch(torch.nn.Sigmoid.forward, "Sigmoid")
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return ops.sigmoid(input)


class Tanh(torch.nn.Tanh):
    """torch.nn.Tanh() on `ops.tanh`; any shape, the input's dtype.

    Example:
        >>> Tanh()(torch.tensor([0.0]))
        tensor([0.])
    """

    @or_torch(torch.nn.Tanh.forward, "Tanh")
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return ops.tanh(input)


class GELU(torch.nn.GELU):
    """torch.nn.GELU(approximate="none") on `ops.gelu`, "none" being the erf form and "tanh" GPT-2's; any shape, the
    input's dtype.

    Example:
        >>> GELU(approximate="tanh")(torch.tensor([0.0]))
        tensor([0.])
    """

    @or_torch(torch.nn.GELU.forward, "GELU")
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return ops.gelu(input, approximate=self.approximate)


class SiLU(torch.nn.SiLU):
    """torch.nn.SiLU(inplace=False) on `ops.silu`; any shape, the input's dtype.

    Example:
        >>> SiLU()(torch.tensor([0.0]))
        tensor([0.])
    """

    @or_torch(torch.nn.SiLU.forward, "SiLU")
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.inplace:
            _log_fallback("SiLU(inplace=True)")
            return super().forward(input)
        return ops.silu(input)


class Dropout(torch.nn.Dropout):
    """torch.nn.Dropout(p=0.5, inplace=False) on `ops.dropout`; any shape, the input's dtype. Masks follow torch.manual_seed.

    Example:
        >>> Dropout(0.5).eval()(torch.tensor([1.0]))
        tensor([1.])
    """

    @or_torch(torch.nn.Dropout.forward, "Dropout")
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.inplace:
            _log_fallback("Dropout(inplace=True)")
            return super().forward(input)
        return ops.dropout(input, self.p, self.training)


class Embedding(torch.nn.Embedding):
    """torch.nn.Embedding(num_embeddings, embedding_dim, padding_idx=None, ...) on `ops.embedding`.

    Args:
        accumulate_grad: keyword only, and not torch's: add gradients straight into `weight.grad` where there is one; what that
            excludes stands in `ops.embedding`. An attribute of the module, too.

    Args of forward:
        input: ids of any shape, int64 or int32.

    Returns:
        A tensor (*input.shape, embedding_dim) in the weight's dtype.

    Example:
        >>> Embedding(5, 2)(torch.tensor([[1, 3, 3]])).shape
        torch.Size([1, 3, 2])
    """

    def __init__(self, *args: Any, accumulate_grad: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.accumulate_grad = accumulate_grad

    @or_torch(torch.nn.Embedding.forward, "Embedding")
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.max_norm is not None or self.scale_grad_by_freq or self.sparse:
            _log_fallback("Embedding with max_norm, scale_grad_by_freq or sparse")
            return super().forward(input)
        return ops.embedding(input, self.weight, self.padding_idx, accumulate_grad=self.accumulate_grad)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss(weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0) on
    `ops.cross_entropy`.

    Args of forward:
        input: logits (C), (N, C) or (N, C, d1, ...), classes in dimension 1 as in torch.
        target: class indices (), (N) or (N, d1, ...), int64; `ignore_index` marks positions that do not count.

    Returns:
        The loss in nats: a scalar, or with reduction="none" a tensor of the target's shape.

    Example:
        >>> CrossEntropyLoss()(torch.zeros(3, 4), torch.tensor([0, 1, 2]))
        tensor(1.3863)
    """

    @or_torch(torch.nn.CrossEntropyLoss.forward, "CrossEntropyLoss")
    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if self.weight is not None or target.is_floating_point():
            _log_fallback("CrossEntropyLoss with class weights or class probabilities")
            return super().forward(input, target)
        return class_loss(input, target, self.ignore_index, self.reduction, self.label_smoothing)


def class_loss(
    input: torch.Tensor, target: torch.Tensor, ignore_index: int, reduction: str, label_smoothing: float
) -> torch.Tensor:
    """torch's cross_entropy of class indices, the classes in dimension 1, on `ops.cross_entropy`.

    Raises:
        ValueError: a target of another shape.
    """
    if input.dim() > 2:
        input = input.movedim(1, -1)  # (N, d1, ..., C)
    classes = input.shape[-1]
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"target: got shape {tuple(target.shape)}; these logits take class indices of shape {tuple(input.shape[:-1])}"
        )
    loss = ops.cross_entropy(
        input.reshape(-1, classes),
        target.reshape(-1),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    if not torch.is_autocast_enabled(input.device.type):
        loss = loss.to(input.dtype)  # the op's is float32 for half types; torch's is so under autocast only
    return loss.view(target.shape) if reduction == "none" else loss
