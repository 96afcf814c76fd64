"""A whole pre-norm transformer block as one op, for the CPU engine: one call forward, one backward.

    x' = x  + attention(layer_norm(x) Wqkv^T + bqkv) Wproj^T + bproj           (causal, grouped heads)
    y  = x' + activation(layer_norm(x') Wfc^T + bfc) Wout^T + bout

In a small model most of a step is the way through Python and the dispatcher, thirteen times a block; in a large one the passes
over memory between the products. `fastgpt.model.Block` takes this op where `covers` says so, and the same parts one by one
elsewhere. In training attention's weights, and what each half adds to x, may be dropped out. Formula in reference/, made of the
parts' own formulas.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgpt.ops import backend, reference
from fastgpt.ops.backend import NotCovered, below_autograd, define
from fastgpt.ops.bias_activation import KINDS
from fastgpt.ops.dropout import MAX_SEED, threshold
from fastgpt.ops.linear import empty_gradient, is_transposed, products_in_halves

_DTYPES = (torch.float32, torch.bfloat16)


def _transposed(params: Sequence[Tensor | None]) -> bool:
    """Whether all matrices lie as their transposes; then they are used in place."""
    return all(p is not None and is_transposed(p) for p in (params[2], params[4], params[8], params[10]))


def _laid_out(params: Sequence[Tensor | None], transposed: bool) -> list[Tensor | None]:
    """The parameters as the engine takes them."""
    return [p if p is None or (transposed and p.dim() == 2) else p.contiguous() for p in params]


def _sizes(x: Tensor, params: Sequence[Tensor | None], heads: int, kv_heads: int, activation: str) -> tuple[int, ...]:
    """The activation's number, batch, time, width, heads, key heads, the width inside."""
    batch, time, width = x.shape
    fc = params[8]
    assert fc is not None
    return KINDS[activation], batch, time, width, heads, kv_heads, fc.shape[0]


_Drops = tuple[list[int], list[int], list[float]]  # seeds, thresholds and scales of attention, projection and MLP


def _drops(seeds: Tensor | None, attention_p: float, p: float) -> _Drops:
    """Dropout as the engine takes it."""
    if seeds is None:
        return [0] * 3, [0] * 3, [1.0] * 3
    if max(attention_p, p) >= 1.0:
        raise NotCovered("p = 1")
    ps = (attention_p, p, p)
    return [seed & (2**64 - 1) for seed in seeds.tolist()], [threshold(q) for q in ps], [1.0 / (1.0 - q) for q in ps]


def _check_dtypes(x: Tensor, params: Sequence[Tensor | None], inner: torch.dtype) -> tuple[int, int, int]:
    """The engine's dtype numbers of the stream, the parameters and what lies between the products."""
    from fastgpt.ops import cpu

    dtypes = {p.dtype for p in params if p is not None}
    if len(dtypes) != 1:
        raise NotCovered(f"parameters of several dtypes {sorted(map(str, dtypes))}")
    if inner not in _DTYPES:
        raise NotCovered(f"dtype {inner} between the products; covered are float32 and bfloat16")
    first = next(p for p in params if p is not None)
    return cpu.dtype_code(x), cpu.dtype_code(first), _DTYPES.index(inner)


def _widths(x: Tensor, params: Sequence[Tensor | None]) -> tuple[int, int, int, int]:
    """What a row of `inner` holds: queries, keys and values; attention's result; the activation's result; its derivative."""
    qkv, fc = params[2], params[8]
    assert qkv is not None
    assert fc is not None
    return qkv.shape[0], x.shape[-1], fc.shape[0], fc.shape[0]


def _state(middle: Tensor, inner: Tensor, stats: Tensor, widths: tuple[int, int, int, int], rows: int) -> list[int]:
    """Addresses in the order of the C++ BlockState."""
    at, part = inner.data_ptr(), inner.element_size() * rows
    attended = at + widths[0] * part
    kept = inner.numel() == rows * sum(widths)
    hidden = attended + widths[1] * part if kept else 0
    slope = hidden + widths[2] * part if kept else 0
    mean = stats.data_ptr()
    row = 4 * rows
    return [
        mean,
        mean + row,
        at,
        mean + 4 * row,
        attended,
        middle.data_ptr(),
        mean + 2 * row,
        mean + 3 * row,
        hidden,
        slope,
    ]


def _cpu(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fastgpt.ops import cpu

    *params, heads, kv_heads, eps, activation, inner, seeds, attention_p, p, keeps = arguments
    codes, drops = _check_dtypes(x, params, inner), _drops(seeds, attention_p, p)
    x, transposed = x.contiguous(), _transposed(params)
    params = _laid_out(params, transposed)
    rows, widths = x.shape[0] * x.shape[1], _widths(x, params)
    y, middle, kept, stats = _results(x, params, heads, inner, keeps)
    cpu.kernels.transformer_block(
        *codes, products_in_halves(inner), transposed, _sizes(x, params, heads, kv_heads, activation), eps, *drops,
        [cpu.address(p) for p in params], x.data_ptr(),
        _state(middle, kept, stats, widths, rows), y.data_ptr(), cpu.threads(),
    )  # fmt: skip
    return y, middle, kept, stats


def _results(
    x: Tensor, params: Sequence[Tensor | None], heads: int, inner: torch.dtype, keeps: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty results: y; x'; what `_widths` lists, the last two only where kept; statistics."""
    rows, widths = x.shape[0] * x.shape[1], _widths(x, params)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    kept = x.new_empty(rows * sum(widths if keeps else widths[:2]), dtype=inner)
    return x.new_empty(x.shape), x.new_empty(x.shape), kept, x.new_empty((4 + heads) * rows, dtype=wide)


def _cpu_backward(
    grad: Tensor, x: Tensor, middle: Tensor, kept: Tensor, stats: Tensor, *arguments: Any
) -> list[Tensor]:
    from fastgpt.ops import cpu

    *params, heads, kv_heads, eps, activation, inner, seeds, attention_p, p, needs_params = arguments
    codes, drops = _check_dtypes(x, params, inner), _drops(seeds, attention_p, p)
    if grad.dtype != x.dtype:
        raise NotCovered(f"a gradient of {grad.dtype} for an input of {x.dtype}")
    grad, x, transposed = grad.contiguous(), x.contiguous(), _transposed(params)
    params = _laid_out(params, transposed)
    rows, widths = x.shape[0] * x.shape[1], _widths(x, params)
    dx = torch.empty_like(x)
    gradients = _gradients(x, params, needs_params)
    cpu.kernels.transformer_block_backward(
        *codes, products_in_halves(inner), transposed, _sizes(x, params, heads, kv_heads, activation), eps, *drops,
        [cpu.address(p) for p in params], x.data_ptr(),
        _state(middle, kept, stats, widths, rows), grad.data_ptr(), dx.data_ptr(),
        [g.data_ptr() if g.numel() else 0 for g in gradients], cpu.threads(),
    )  # fmt: skip
    return [dx, *gradients]


def _gradients(x: Tensor, params: Sequence[Tensor | None], needed: bool) -> list[Tensor]:
    """Empty gradients of the parameters, without elements for those that are not there or not needed."""
    transposed = _transposed(params)
    return [
        x.new_empty(0) if p is None or not needed else empty_gradient(p, transposed and p.dim() == 2) for p in params
    ]


def _fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *params, heads, _kv_heads, _eps, _activation, inner, _seeds, _attention_p, _p, keeps = arguments
    return _results(x, params, heads, inner, keeps)


def _fake_backward(
    grad: Tensor, x: Tensor, middle: Tensor, kept: Tensor, stats: Tensor, *arguments: Any
) -> list[Tensor]:
    *params, _heads, _kv_heads, _eps, _activation, _inner, _seeds, _attention_p, _p, needs_params = arguments
    return [x.new_empty(x.shape), *_gradients(x, params, needs_params)]


class _Rule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        y, *kept = below_autograd(_transformer_block, x, *arguments)
        *_, seeds, attention_p, p, _keeps = arguments
        ctx.save_for_backward(x, *kept, *arguments[:12], seeds)
        ctx.options, ctx.drops = arguments[12:17], (attention_p, p)
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        return y, *kept

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        if grad is None:
            return (None,) * len(needs)
        needs_params = any(needs[1:13])
        *saved, seeds = ctx.saved_tensors
        dx, *gradients = _transformer_block_backward(grad, *saved, *ctx.options, seeds, *ctx.drops, needs_params)
        wanted = [g if need else None for g, need in zip(gradients, needs[1:13], strict=True)]
        return dx if needs[0] else None, *wanted, *(None for _ in range(9))


_PARAMS = (
    "Tensor norm1_weight, Tensor? norm1_bias, Tensor qkv_weight, Tensor? qkv_bias, Tensor proj_weight, Tensor? proj_bias,"
    " Tensor norm2_weight, Tensor? norm2_bias, Tensor fc_weight, Tensor? fc_bias, Tensor out_weight, Tensor? out_bias,"
    " int heads, int kv_heads, float eps, str activation, ScalarType inner,"
    " Tensor? seeds, float attention_p, float p"
)
_transformer_block = define(
    f"transformer_block(Tensor x, {_PARAMS}, bool keeps) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    reference=reference.transformer_block,
    cpu=_cpu,
    autograd=_Rule,
)
_transformer_block_backward = define(
    f"transformer_block_backward(Tensor grad, Tensor x, Tensor middle, Tensor kept, Tensor stats, {_PARAMS},"
    " bool needs_params) -> Tensor[]",
    fake=_fake_backward,
    reference=reference.transformer_block_backward,
    cpu=_cpu_backward,
)


def _on_cpu() -> bool:
    return backend.engine_of("transformer_block")[0] == "cpu"


# What torch.compiler.assume_constant_result sets; calling that imports all of torch._dynamo (1.3 s), and with it triton.
_on_cpu._dynamo_marked_constant = True  # type: ignore[attr-defined]


def covers(x: Tensor) -> bool:
    """Whether a block on this tensor's device is one call of the CPU engine (elsewhere its parts are as fast one by one)."""
    return x.device.type == "cpu" and x.dtype in _DTYPES and _on_cpu()


def transformer_block(
    input: Tensor,
    params: Sequence[Tensor | None],
    *,
    n_head: int,
    n_kv_head: int | None = None,
    activation: str = "gelu_tanh",
    eps: float = 1e-5,
    attention_dropout: float = 0.0,
    dropout: float = 0.0,
    seeds: Tensor | None = None,
) -> Tensor:
    """One pre-norm block of a GPT: causal self-attention, then the MLP, each behind a layer norm and added to the input.

    Args:
        input: (B, T, C), float32 or bfloat16 (any floating dtype in the formula).
        params: weight and bias, one after the other, of the first norm (C), the projection to queries, keys and values
            ((H + 2 H_kv) D, C), attention's output projection (C, C), the second norm (C), the MLP's first layer (F, C) and its
            second (C, F); any bias may be None. All of one dtype. Matrices that are all `.t()` of contiguous ones are read
            where they are.
        n_head, n_kv_head: heads of queries, and of keys and values (n_head where None).
        activation: "relu", "sigmoid", "tanh", "gelu", "gelu_tanh" or "silu".
        eps: added to the norms' variance.
        attention_dropout, dropout: the probability of one of attention's weights, and of one number that a half adds to the input, to
            be dropped; the masks are those of `ops.dropout`, of elements in the order (B, H, T, T) and (B, T, C).
        seeds: (3,) int64 of attention's weights, of the first and of the second half; None draws them from torch's default generator.

    Products follow torch: under autocast what lies between them is kept in its dtype; with
    `torch.set_float32_matmul_precision("medium")` float32 numbers are multiplied as bfloat16 and summed in float32.

    Returns:
        (B, T, C) in the input's dtype.

    Raises:
        ValueError: shapes that do not fit, an unknown activation, a probability outside of [0, 1].
    """
    return _checked(input, params, n_head, n_kv_head, activation, eps, attention_dropout, dropout, seeds)[0]


def transformer_block_with_qkv(
    input: Tensor,
    params: Sequence[Tensor | None],
    *,
    n_head: int,
    n_kv_head: int | None = None,
    activation: str = "gelu_tanh",
    eps: float = 1e-5,
    attention_dropout: float = 0.0,
    dropout: float = 0.0,
    seeds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`transformer_block`, and the queries, keys and values it made, (B, T, (H + 2 H_kv) D) in the dtype between the products: for a
    cache. They carry no gradient and share memory with what the backward reads, so that they are not to be written to."""
    y, kept = _checked(input, params, n_head, n_kv_head, activation, eps, attention_dropout, dropout, seeds)
    rows, out = input.shape[0] * input.shape[1], params[2].shape[0]  # type: ignore[union-attr]
    return y, kept[: rows * out].view(*input.shape[:2], out)


def _checked(
    input: Tensor,
    params: Sequence[Tensor | None],
    n_head: int,
    n_kv_head: int | None,
    activation: str,
    eps: float,
    attention_dropout: float,
    dropout: float,
    seeds: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The op's y and what it keeps between the products, after the checks of the public functions."""
    if input.dim() != 3 or len(params) != 12:
        raise ValueError(
            f"transformer_block: got input {tuple(input.shape)} and {len(params)} parameters, expected (B, T, C) and 12"
        )
    if activation not in KINDS:
        raise ValueError(f"transformer_block: activation is {activation!r}, expected one of {', '.join(KINDS)}")
    n_kv_head = n_head if n_kv_head is None else n_kv_head
    width = input.shape[-1]
    if n_head < 1 or width % n_head or n_kv_head < 1 or n_head % n_kv_head:
        raise ValueError(f"transformer_block: {n_head} heads and {n_kv_head} key heads do not fit a width of {width}")
    hidden = params[8].shape[0] if params[8] is not None else 0
    out = width // n_head * (n_head + 2 * n_kv_head)
    shapes = [(width,), (out, width), (width, width), (width,), (hidden, width), (width, hidden)]
    for i, p in enumerate(params):
        shape = shapes[i // 2] if i % 2 == 0 else shapes[i // 2][:1]
        if (p is None and i % 2 == 0) or (p is not None and p.shape != shape):
            got = None if p is None else tuple(p.shape)
            raise ValueError(f"transformer_block: params[{i}] has shape {got}, expected {shape}")
    if not (0.0 <= attention_dropout <= 1.0 and 0.0 <= dropout <= 1.0):
        raise ValueError(f"transformer_block: dropout is {attention_dropout} and {dropout}, expected 0 to 1")
    if seeds is not None and (seeds.shape != (3,) or seeds.dtype != torch.int64):
        raise ValueError(
            f"transformer_block: seeds is {seeds.dtype} of shape {tuple(seeds.shape)}, expected int64 (3,)"
        )
    if attention_dropout == dropout == 0.0:
        seeds = None
    elif seeds is None:
        seeds = torch.randint(MAX_SEED, (3,), dtype=torch.int64, device=input.device)
    inner = input.dtype
    if torch.is_autocast_enabled(input.device.type):
        inner = torch.get_autocast_dtype(input.device.type)
    keeps = torch.is_grad_enabled() and (input.requires_grad or any(p is not None and p.requires_grad for p in params))
    drops = (seeds, attention_dropout, dropout)
    y, _, kept, _ = _transformer_block(input, *params, n_head, n_kv_head, eps, activation, inner, *drops, keeps)
    return y, kept
