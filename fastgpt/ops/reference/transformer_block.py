"""A pre-norm transformer block (Radford et al., 2019, 2.3), made of the formulas of its parts."""

import torch
from torch import Tensor

from fastgpt.ops.reference.activation import by_name, derivative
from fastgpt.ops.reference.attention import attention, attention_backward
from fastgpt.ops.reference.common import wide
from fastgpt.ops.reference.dropout import dropout_mask
from fastgpt.ops.reference.layer_norm import layer_norm, layer_norm_backward
from fastgpt.ops.reference.linear import project, project_backward


def _heads(qkv: Tensor, heads: int, kv_heads: int) -> list[Tensor]:
    """(B, T, (H + 2 H_kv) D) as queries, keys and values, (B, H, T, D) each."""
    parts = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).split([heads, kv_heads, kv_heads], dim=2)
    return [part.transpose(1, 2) for part in parts]


def _of_attention(seeds: Tensor | None, p: float) -> tuple[float, Tensor | None]:
    """The arguments of attention's dropout."""
    return (0.0, None) if seeds is None else (p, seeds[0])


def _dropped(x: Tensor, seeds: Tensor | None, which: int, p: float) -> Tensor:
    """x mask / (1 - p), with the mask of one of the three seeds."""
    if seeds is None or p == 0.0:
        return x
    return x * dropout_mask(x.shape, seeds[which], p) / (1 - p) if p < 1.0 else x * 0.0


def transformer_block(
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    norm2_weight: Tensor,
    norm2_bias: Tensor | None,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    heads: int,
    kv_heads: int,
    eps: float,
    activation: str,
    inner: torch.dtype,
    seeds: Tensor | None,
    attention_p: float,
    p: float,
    keeps: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y; x' (after attention); queries, keys, values, attention's result and (where kept) the activation's result and derivative, flat,
    in `inner`; the means and 1 / standard deviations of both norms and the scores' log-sum-exp, flat."""
    normed, mean1, rstd1 = layer_norm(x, norm1_weight, norm1_bias, eps)
    qkv = project(normed, qkv_weight, qkv_bias).to(inner)
    q, k, v = _heads(qkv, heads, kv_heads)
    attended, lse = attention(q, k, v, True, q.shape[-1] ** -0.5, *_of_attention(seeds, attention_p))
    attended = attended.transpose(1, 2).flatten(2)
    middle = (_dropped(project(attended, proj_weight, proj_bias), seeds, 1, p) + wide(x)).to(x.dtype)
    normed, mean2, rstd2 = layer_norm(middle, norm2_weight, norm2_bias, eps)
    hidden = project(normed, fc_weight, fc_bias)
    hidden, slope = (by_name(activation)(hidden).to(inner), derivative(hidden, activation).to(inner))
    y = (_dropped(project(hidden, out_weight, out_bias), seeds, 2, p) + wide(middle)).to(x.dtype)
    kept = torch.cat([part.reshape(-1) for part in ((qkv, attended, hidden, slope) if keeps else (qkv, attended))])
    return y, middle, kept, torch.cat([part.reshape(-1) for part in (mean1, rstd1, mean2, rstd2, lse)])


def transformer_block_backward(
    grad: Tensor,
    x: Tensor,
    middle: Tensor,
    kept: Tensor,
    stats: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    norm2_weight: Tensor,
    norm2_bias: Tensor | None,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    heads: int,
    kv_heads: int,
    eps: float,
    activation: str,
    inner: torch.dtype,
    seeds: Tensor | None,
    attention_p: float,
    p: float,
    needs_params: bool,
) -> list[Tensor]:
    """dx, then the parameters' gradients in their order, empty where there is no parameter or none is needed."""
    rows = x.shape[:-1]
    widths = (qkv_weight.shape[0], x.shape[-1], fc_weight.shape[0], fc_weight.shape[0])
    qkv, attended, hidden, slope = (
        part.view(*rows, width)
        for part, width in zip(kept.split([rows.numel() * width for width in widths]), widths, strict=True)
    )
    mean1, rstd1, mean2, rstd2 = (part.view(rows) for part in stats[: 4 * rows.numel()].chunk(4))
    lse = stats[4 * rows.numel() :].view(rows[0], heads, rows[1])

    dactivated, dout, dout_bias = project_backward(_dropped(wide(grad), seeds, 2, p), hidden, out_weight)
    dhidden = (dactivated * wide(slope)).to(inner)
    normed = layer_norm(middle, norm2_weight, norm2_bias, eps)[0]
    dnormed, dfc, dfc_bias = project_backward(dhidden, normed, fc_weight)
    dmiddle, dnorm2, dnorm2_bias = layer_norm_backward(dnormed, wide(middle), norm2_weight, mean2, rstd2, True)
    dmiddle = dmiddle + wide(grad)

    dattended, dproj, dproj_bias = project_backward(_dropped(dmiddle, seeds, 1, p), attended, proj_weight)
    q, k, v = _heads(qkv, heads, kv_heads)
    dattended, attended = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (dattended.to(inner), attended))
    dq, dk, dv = attention_backward(
        dattended, q, k, v, attended, lse, True, q.shape[-1] ** -0.5, *_of_attention(seeds, attention_p)
    )
    dqkv = torch.cat([part.transpose(1, 2) for part in (dq, dk, dv)], dim=2).flatten(2)
    normed = layer_norm(x, norm1_weight, norm1_bias, eps)[0]
    dnormed, dqkv_weight, dqkv_bias = project_backward(dqkv, normed, qkv_weight)
    dx, dnorm1, dnorm1_bias = layer_norm_backward(dnormed, wide(x), norm1_weight, mean1, rstd1, True)

    pairs = (
        (dnorm1, norm1_weight), (dnorm1_bias, norm1_bias), (dqkv_weight, qkv_weight), (dqkv_bias, qkv_bias),
        (dproj, proj_weight), (dproj_bias, proj_bias), (dnorm2, norm2_weight), (dnorm2_bias, norm2_bias),
        (dfc, fc_weight), (dfc_bias, fc_bias), (dout, out_weight), (dout_bias, out_bias),
    )  # fmt: skip
    gradients = [x.new_empty(0) if w is None or not needs_params else d.to(w.dtype).contiguous() for d, w in pairs]
    return [(dx + dmiddle).to(x.dtype).contiguous(), *gradients]
