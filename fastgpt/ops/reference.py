"""The formulas: every op and its gradient in plain torch, on any device and dtype.

Each engine is tested against these functions in float64. They compute in float32 for half types and in the input's own type otherwise,
and they are the last engine that takes what the others do not cover. Arguments are those of the ops' schemas, not of the public
functions: the reduced dimension is last, defaults are filled in.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    """The tensor in the type that formulas are computed in: float32 for half types, its own otherwise."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


# ---- activations; GELU is arXiv 1606.08415


def relu(x: Tensor) -> Tensor:
    return torch.where(x < 0, torch.zeros_like(x), x)


def relu_backward(grad: Tensor, y: Tensor) -> Tensor:
    return torch.where(y <= 0, torch.zeros_like(grad), grad)


def sigmoid(x: Tensor) -> Tensor:
    return (1 / (1 + torch.exp(-_wide(x)))).to(x.dtype)


def sigmoid_backward(grad: Tensor, y: Tensor) -> Tensor:
    s = _wide(y)
    return (_wide(grad) * s * (1 - s)).to(grad.dtype)


def tanh(x: Tensor) -> Tensor:
    return torch.tanh(_wide(x)).to(x.dtype)


def tanh_backward(grad: Tensor, y: Tensor) -> Tensor:
    return (_wide(grad) * (1 - _wide(y) ** 2)).to(grad.dtype)


def silu(x: Tensor) -> Tensor:
    v = _wide(x)
    return (v / (1 + torch.exp(-v))).to(x.dtype)


def silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    v = _wide(x)
    s = 1 / (1 + torch.exp(-v))
    return (_wide(grad) * s * (1 + v * (1 - s))).to(grad.dtype)


_CUBIC = 0.044715


def gelu(x: Tensor, approximate: str) -> Tensor:
    v = _wide(x)
    if approximate == "tanh":
        u = math.sqrt(2 / math.pi) * (v + _CUBIC * v**3)
        return (0.5 * v * (1 + torch.tanh(u))).to(x.dtype)
    return (0.5 * v * (1 + torch.erf(v / math.sqrt(2)))).to(x.dtype)


def gelu_backward(grad: Tensor, x: Tensor, approximate: str) -> Tensor:
    v, g = _wide(x), _wide(grad)
    if approximate == "tanh":
        t = torch.tanh(math.sqrt(2 / math.pi) * (v + _CUBIC * v**3))
        slope = math.sqrt(2 / math.pi) * (1 + 3 * _CUBIC * v**2)
        return (g * (0.5 * (1 + t) + 0.5 * v * (1 - t**2) * slope)).to(grad.dtype)
    density = torch.exp(-0.5 * v**2) / math.sqrt(2 * math.pi)
    return (g * (0.5 * (1 + torch.erf(v / math.sqrt(2))) + v * density)).to(grad.dtype)


# ---- activation(x + bias)

KEEPS_RESULT = ("relu", "sigmoid", "tanh")  # their gradient needs the result, that of the others the input


def _activation(kind: str, backward: bool = False) -> tuple[Callable[..., Tensor], tuple[str, ...]]:
    """The formula of an activation by its name (or of its gradient), and the arguments after its tensors."""
    name = "gelu" if kind == "gelu_tanh" else kind
    options = {"gelu": ("none",), "gelu_tanh": ("tanh",)}.get(kind, ())
    return globals()[f"{name}_backward" if backward else name], options


def bias_activation(x: Tensor, bias: Tensor, kind: str) -> Tensor:
    f, options = _activation(kind)
    return f(_wide(x) + _wide(bias), *options).to(x.dtype)


def bias_activation_backward(
    grad: Tensor, saved: Tensor, bias: Tensor, kind: str, needs_bias: bool
) -> tuple[Tensor, Tensor]:
    """dx, and its sum over all but the last dimension, which is empty where `needs_bias` is false."""
    f, options = _activation(kind, backward=True)
    kept = _wide(saved) if kind in KEEPS_RESULT else _wide(saved) + _wide(bias)
    dx = f(_wide(grad), kept, *options)
    if not needs_bias:
        return dx.to(saved.dtype), bias.new_empty(0)
    return dx.to(saved.dtype), dx.reshape(-1, bias.numel()).sum(0).to(bias.dtype)


# ---- gated linear units, arXiv 2002.05202; without `up` the gate holds both halves


def _gated(gate: Tensor, up: Tensor | None, f: Callable[[Tensor], Tensor]) -> Tensor:
    left, right = gate.chunk(2, -1) if up is None else (gate, up)
    return (f(_wide(left)) * _wide(right)).to(gate.dtype)


def _gated_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    f: Callable[[Tensor], Tensor],
    f_backward: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """dgate and dup; both in the first and the second empty, where the gate holds both halves."""
    left, right = gate.chunk(2, -1) if up is None else (gate, up)
    dgate = f_backward(_wide(grad) * _wide(right), _wide(left)).to(gate.dtype)
    dup = (_wide(grad) * f(_wide(left))).to(gate.dtype)
    return (torch.cat([dgate, dup], -1), gate.new_empty(0)) if up is None else (dgate, dup)


def swiglu(gate: Tensor, up: Tensor | None) -> Tensor:
    return _gated(gate, up, silu)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    return _gated_backward(grad, gate, up, silu, silu_backward)


def geglu(gate: Tensor, up: Tensor | None, approximate: str) -> Tensor:
    return _gated(gate, up, lambda x: gelu(x, approximate))


def geglu_backward(grad: Tensor, gate: Tensor, up: Tensor | None, approximate: str) -> tuple[Tensor, Tensor]:
    return _gated_backward(
        grad, gate, up, lambda x: gelu(x, approximate), lambda g, x: gelu_backward(g, x, approximate)
    )


# ---- softmax


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """(queries, keys) bool, True where query i may see key j: j <= i + keys - queries, aligned to the bottom right."""
    i = torch.arange(queries, device=device)[:, None]
    j = torch.arange(keys, device=device)[None, :]
    return j <= i + keys - queries


def softmax(x: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Tensor:
    """exp(v - max v) / sum exp(v - max v) over the last dimension, v = scale * x + mask."""
    v = _wide(x) * scale
    if mask is not None:
        v = v + mask
    if is_causal:
        v = v.masked_fill(~causal_mask(x.shape[-2], x.shape[-1], x.device), -math.inf)
    if v.shape[-1] == 0:
        return v.to(x.dtype)
    e = torch.exp(v - v.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)).to(x.dtype)


def softmax_backward(grad: Tensor, y: Tensor, scale: float) -> Tensor:
    g, p = _wide(grad), _wide(y)
    return (scale * p * (g - (g * p).sum(-1, keepdim=True))).to(grad.dtype)


def log_softmax(x: Tensor) -> Tensor:
    """(x - max x) - log sum exp(x - max x) over the last dimension."""
    if x.shape[-1] == 0:
        return x.clone()
    v = _wide(x)
    v = v - v.amax(-1, keepdim=True)
    return (v - torch.log(torch.exp(v).sum(-1, keepdim=True))).to(x.dtype)


def log_softmax_backward(grad: Tensor, y: Tensor) -> Tensor:
    g = _wide(grad)
    return (g - torch.exp(_wide(y)) * g.sum(-1, keepdim=True)).to(grad.dtype)


# ---- layer norm, arXiv 1607.06450


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and 1 / standard deviation over the last dimension; the statistics have x's shape less that dimension."""
    v = _wide(x)
    mean = v.mean(-1)
    centred = v - mean[..., None]
    rstd = 1 / torch.sqrt((centred**2).mean(-1) + eps)
    y = centred * rstd[..., None]
    if weight is not None:
        y = y * _wide(weight)
    if bias is not None:
        y = y + _wide(bias)
    return y.to(x.dtype), mean, rstd


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, needs_params: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias; the last two are empty where `needs_params` is false."""
    dy = _wide(grad)
    xhat = (_wide(x) - mean[..., None]) * rstd[..., None]
    g = dy if weight is None else dy * _wide(weight)
    dx = rstd[..., None] * (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True))
    param_dtype = x.dtype if weight is None else weight.dtype
    if not needs_params:
        return dx.to(x.dtype), x.new_empty(0, dtype=param_dtype), x.new_empty(0, dtype=param_dtype)
    rows = (-1, x.shape[-1])
    dweight = (dy * xhat).reshape(rows).sum(0).to(param_dtype)
    return dx.to(x.dtype), dweight, dy.reshape(rows).sum(0).to(param_dtype)


# ---- RMS norm, arXiv 1910.07467, equation 4


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """y and 1 / root mean square over the last dimension."""
    v = _wide(x)
    rstd = 1 / torch.sqrt((v**2).mean(-1) + eps)
    y = v * rstd[..., None]
    if weight is not None:
        y = y * _wide(weight)
    return y.to(x.dtype), rstd


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """dx and dweight, which is empty where `needs_weight` is false."""
    dy = _wide(grad)
    xhat = _wide(x) * rstd[..., None]
    g = dy if weight is None else dy * _wide(weight)
    dx = rstd[..., None] * (g - xhat * (g * xhat).mean(-1, keepdim=True))
    param_dtype = x.dtype if weight is None else weight.dtype
    if not needs_weight:
        return dx.to(x.dtype), x.new_empty(0, dtype=param_dtype)
    return dx.to(x.dtype), (dy * xhat).reshape(-1, x.shape[-1]).sum(0).to(param_dtype)


# ---- residual and norm: the sum is rounded to its dtype before it is normalised, as in x + residual alone


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the sum, mean and 1 / standard deviation."""
    summed = x + residual
    y, mean, rstd = layer_norm(summed, weight, bias, eps)
    return y, summed, mean, rstd


def add_layer_norm_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    summed: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    needs_params: bool,
    needs_half: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of both addends, the same in bf16 (empty unless `needs_half`), dweight and dbias."""
    dx, dweight, dbias = layer_norm_backward(grad.to(rstd.dtype), _wide(summed), weight, mean, rstd, needs_params)
    dx, half = _with_gradient_of_sum(dx, grad_sum, summed, needs_half)
    return dx, half, _like_params(dweight, summed, weight), _like_params(dbias, summed, weight)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, the sum and 1 / root mean square."""
    summed = x + residual
    y, rstd = rms_norm(summed, weight, eps)
    return y, summed, rstd


def add_rms_norm_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    summed: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    needs_weight: bool,
    needs_half: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of both addends, the same in bf16 (empty unless `needs_half`), and dweight."""
    dx, dweight = rms_norm_backward(grad.to(rstd.dtype), _wide(summed), weight, rstd, needs_weight)
    dx, half = _with_gradient_of_sum(dx, grad_sum, summed, needs_half)
    return dx, half, _like_params(dweight, summed, weight)


def _with_gradient_of_sum(
    dx: Tensor, grad_sum: Tensor | None, summed: Tensor, needs_half: bool
) -> tuple[Tensor, Tensor]:
    dx = dx if grad_sum is None else dx + _wide(grad_sum)
    half = dx.to(torch.bfloat16) if needs_half else dx.new_empty(0, dtype=torch.bfloat16)
    return dx.to(summed.dtype), half


def _like_params(gradient: Tensor, summed: Tensor, weight: Tensor | None) -> Tensor:
    return gradient.to(summed.dtype if weight is None else weight.dtype)


# ---- rotary position embedding, arXiv 2104.09864, equation 34


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    """Each pair (x1, x2) of the first 2 * cos.shape[-1] elements becomes (x1 cos - x2 sin, x2 cos + x1 sin)."""
    pairs = cos.shape[-1]
    v = _wide(x)
    c, s = cos.to(v.dtype), sin.to(v.dtype)
    s = -s if inverse else s
    turned, rest = v.split((2 * pairs, x.shape[-1] - 2 * pairs), -1)
    a, b = turned.unflatten(-1, (pairs, 2)).unbind(-1) if interleaved else turned.chunk(2, -1)
    parts = a * c - b * s, b * c + a * s
    turned = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat([turned, rest], -1).to(x.dtype).transpose(1, 2).contiguous().transpose(1, 2)


# ---- dropout, with the random numbers of Philox4x32-10 (Salmon et al., SC11, table 2 and section 4.3)


def philox(counter: Tensor, seed: Tensor) -> Tensor:
    """(..., 4) words in [0, 2^32) as int64, of int64 counters (their upper 64 bits 0) and a scalar int64 key."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counter & low, (counter >> 32) & low, torch.zeros_like(counter), torch.zeros_like(counter)
    key0, key1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # modulo 2^64, which is all that is read of them
        c0, c1, c2, c3 = (
            ((product1 >> 32) & low) ^ c1 ^ key0,
            product1 & low,
            ((product0 >> 32) & low) ^ c3 ^ key1,
            product0 & low,
        )
        key0, key1 = (key0 + 0x9E3779B9) & low, (key1 + 0xBB67AE85) & low
    return torch.stack([c0, c1, c2, c3], -1)


def dropout_mask(shape: Sequence[int], seed: Tensor, p: float) -> Tensor:
    """True where an element is kept: word i % 4 of philox(i // 4, seed) is at least p 2^32."""
    count = math.prod(shape)
    words = philox(torch.arange((count + 3) // 4, device=seed.device), seed).flatten()[:count]
    return (words >= min(round(p * 2**32), 2**32 - 1)).view(shape)


def dropout(x: Tensor, residual: Tensor | None, seed: Tensor, p: float) -> Tensor:
    """x mask / (1 - p), and the residual; arXiv 1207.0580 with the scale in training."""
    factor = 1 / (1 - p) if p < 1 else 0.0
    y = _wide(x) * (dropout_mask(x.shape, seed, p) * factor if p < 1 else 0.0)
    return y.to(x.dtype) if residual is None else (y + _wide(residual)).to(residual.dtype)


# ---- embedding


def embedding(input_ids: Tensor, weight: Tensor) -> Tensor:
    return weight[input_ids.long()]


def embedding_backward(grad: Tensor, input_ids: Tensor, rows: int, padding_idx: int) -> Tensor:
    dweight = _wide(grad).new_zeros(rows, grad.shape[-1])
    embedding_accumulate(dweight, _wide(grad), input_ids, padding_idx)
    return dweight.to(grad.dtype)


def embedding_accumulate(into: Tensor, grad: Tensor, input_ids: Tensor, padding_idx: int) -> None:
    """Adds each position's gradient to its id's row, in place."""
    ids = input_ids.reshape(-1).long()
    rows = grad.reshape(-1, grad.shape[-1]).to(into.dtype)
    into.index_add_(0, ids, torch.where((ids != padding_idx)[:, None], rows, 0.0))


# ---- attention


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale * query key^T) value, and the log-sum-exp of the scores (B, H, Tq); rows that see nothing are 0 and -inf."""
    p, lse = _probabilities(query, key, is_causal, scale)
    o = (p * _dropout_factor(p, dropout_p, seed)) @ _repeat(value, query.shape[1])
    return o.to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2), lse


def attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, is_causal: bool, scale: float,
    dropout_p: float = 0.0, seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dV = (M P)^T dO; dS = P (M dO V^T - rowsum(dO O)); dQ = scale dS K; dK = scale dS^T Q (arXiv 2205.14135, appendix B.4), M
    the dropout's factors."""
    heads, kv_heads = query.shape[1], key.shape[1]
    do = _wide(grad)
    p, _ = _probabilities(query, key, is_causal, scale)
    m = _dropout_factor(p, dropout_p, seed)
    dv = (m * p).transpose(-1, -2) @ do
    dp = do @ _repeat(value, heads).transpose(-1, -2)
    ds = scale * p * (m * dp - (do * ((m * p) @ _repeat(value, heads))).sum(-1, keepdim=True))
    dq = ds @ _repeat(key, heads)
    dk = ds.transpose(-1, -2) @ _wide(query)
    dk, dv = (g.unflatten(1, (kv_heads, heads // kv_heads)).sum(2) if heads != kv_heads else g for g in (dk, dv))
    layout = [g.transpose(1, 2).contiguous().transpose(1, 2) for g in (dq, dk, dv)]
    return layout[0].to(query.dtype), layout[1].to(key.dtype), layout[2].to(value.dtype)


def _dropout_factor(p: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor | float:
    """0 where a weight is dropped, 1 / (1 - dropout_p) elsewhere."""
    if seed is None or dropout_p == 0.0:
        return 1.0
    return dropout_mask(p.shape, seed, dropout_p) / (1 - dropout_p) if dropout_p < 1.0 else 0.0


def _repeat(x: Tensor, heads: int) -> Tensor:
    """Each of the H_kv heads for the heads // H_kv query heads that share it, in the formulas' type."""
    return _wide(x) if x.shape[1] == heads else _wide(x).repeat_interleave(heads // x.shape[1], 1)


def _probabilities(query: Tensor, key: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    heads = query.shape[1]
    scores = scale * (_wide(query) @ _repeat(key, heads).transpose(-1, -2))  # (B, H, Tq, Tk)
    sees_some = torch.full(scores.shape[-2:-1], scores.shape[-1] > 0, device=scores.device)
    if is_causal:
        seen = causal_mask(scores.shape[-2], scores.shape[-1], scores.device)
        scores = scores.masked_fill(~seen, -math.inf)
        sees_some = seen.any(-1)
    lse = torch.logsumexp(scores, -1)
    p = torch.where(sees_some[:, None], torch.exp(scores - lse[..., None]), 0.0)
    return p, torch.where(sees_some, lse, -math.inf)


# ---- cross-entropy, with label smoothing as in arXiv 1512.00567 (section 7)


def cross_entropy(
    logits: Tensor, target: Tensor, ignore_index: int, reduction: str, label_smoothing: float, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The loss (a scalar, or (N) for reduction "none") and each row's log-sum-exp (0 where the target is ignored).

    The log-sum-exp is float64: its rounding to float32 would be the gradient's largest error.
    """
    v = _wide(logits)
    counted = target != ignore_index
    safe = torch.where(counted, target, 0)
    if bool(((safe < 0) | (safe >= v.shape[-1])).any()):
        raise IndexError(f"target: expected 0 to {v.shape[-1] - 1} or ignore_index ({ignore_index}), got one outside")
    exact = _log_sum_exp(v)
    lse = exact.to(v.dtype)
    losses = (1 - label_smoothing) * (lse - v.gather(-1, safe[:, None])[:, 0])
    if label_smoothing > 0:
        losses = losses + label_smoothing * (lse - v.mean(-1))
    if z_loss > 0:
        losses = losses + z_loss * lse**2
    losses = torch.where(counted, losses, 0.0)
    exact = torch.where(counted, exact, 0.0)
    if reduction == "none":
        return losses, exact
    total = losses.sum()
    return (total if reduction == "sum" else total / counted.sum()), exact


def _log_sum_exp(v: Tensor) -> Tensor:
    """Of each row, with the sum's logarithm and what is added to it in float64."""
    top = v.detach().amax(-1)
    top = torch.where(top.isfinite(), top, 0.0)
    return top.double() + torch.exp(v - top[:, None]).sum(-1).double().log()


def cross_entropy_backward(
    grad: Tensor, logits: Tensor, target: Tensor, lse: Tensor, ignore_index: int, reduction: str, label_smoothing: float,
    z_loss: float = 0.0,
) -> Tensor:  # fmt: skip
    v = _wide(logits)
    counted = target != ignore_index
    g = grad.to(v.dtype) / counted.sum() if reduction == "mean" else grad.to(v.dtype)
    near = lse.to(v.dtype)
    rest = torch.where(near.isfinite(), lse - near, 0.0).to(v.dtype)
    factor = (1 + 2 * z_loss * near) * (1 - rest)
    p = torch.exp(v - near[:, None]) * factor[:, None] - label_smoothing / v.shape[-1]
    safe = torch.where(counted, target, 0)
    p.scatter_add_(-1, safe[:, None], torch.full_like(p[:, :1], label_smoothing - 1))
    return (torch.where(counted[:, None], p, 0.0) * g[..., None]).to(logits.dtype)


def cross_entropy_inplace(
    logits: Tensor, target: Tensor, ignore_index: int, reduction: str, label_smoothing: float, z_loss: float
) -> Tensor:
    """The loss; the logits are replaced by their gradient (of the losses' sum for reduction "none")."""
    options = (ignore_index, reduction, label_smoothing, z_loss)
    loss, lse = cross_entropy(logits, target, *options)
    logits.copy_(cross_entropy_backward(torch.ones_like(loss), logits, target, lse, *options))
    return loss


# ---- linear layers with an activation and a residual


def _activate(x: Tensor, activation: str) -> Tensor:
    """The activation of that name; the input where it has none."""
    if activation.startswith("gelu"):
        return gelu(x, "tanh" if activation == "gelu_tanh" else "none")
    formulas = {"": lambda v: v, "relu": relu, "sigmoid": sigmoid, "tanh": tanh, "silu": silu}
    return formulas[activation](x)


def _slope(x: Tensor, activation: str) -> Tensor:
    """The activation's derivative."""
    one = torch.ones_like(x)
    if activation.startswith("gelu"):
        return gelu_backward(one, x, "tanh" if activation == "gelu_tanh" else "none")
    if activation == "silu":
        return silu_backward(one, x)
    formulas = {"relu": relu_backward, "sigmoid": sigmoid_backward, "tanh": tanh_backward}
    return formulas[activation](one, _activate(x, activation))


def _project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = _wide(x) @ _wide(weight).T
    return y if bias is None else y + _wide(bias)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    dtype: torch.dtype,
    keeps: bool,
) -> tuple[Tensor, Tensor]:
    """activation(x weight^T + bias) + residual, and the activation's derivative (empty where there is none or it is not kept)."""
    before = _project(x, weight, bias)
    y = _activate(before, activation)
    slope = _slope(before, activation).to(dtype) if activation and keeps else x.new_empty(0, dtype=dtype)
    return (y if residual is None else y + _wide(residual)).to(dtype), slope


def linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias of x weight^T + bias, empty where not needed."""
    dx, dweight, dbias = _project_backward(grad, x, weight)
    return (
        dx.to(x.dtype) if needs_x else x.new_empty(0),
        dweight.to(weight.dtype) if needs_weight else weight.new_empty(0),
        dbias.to(weight.dtype) if needs_bias else weight.new_empty(0),
    )


def _project_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias in the formulas' type."""
    dy = _wide(grad)
    rows = dy.reshape(-1, dy.shape[-1])
    return dy @ _wide(weight), rows.T @ _wide(x).reshape(-1, x.shape[-1]), rows.sum(0)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    dtype: torch.dtype,
    keeps: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of the logits x weight^T and the gradients of x and weight (empty where not kept)."""
    logits = _project(x, weight, None).to(dtype)
    loss, lse = cross_entropy(logits, target, ignore_index, reduction, label_smoothing)
    if not keeps:
        return loss, x.new_empty(0), weight.new_empty(0)
    grad = cross_entropy_backward(torch.ones_like(loss), logits, target, lse, ignore_index, reduction, label_smoothing)
    dx, dweight, _ = _project_backward(grad, x, weight)
    return loss, dx.to(x.dtype), dweight.to(weight.dtype)


# ---- a pre-norm transformer block (Radford et al., 2019, 2.3), made of the formulas above


def _heads(qkv: Tensor, heads: int, kv_heads: int) -> list[Tensor]:
    """(B, T, (H + 2 H_kv) D) as queries, keys and values, (B, H, T, D) each."""
    parts = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).split([heads, kv_heads, kv_heads], dim=2)
    return [part.transpose(1, 2) for part in parts]


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
    keeps: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y; x' (after attention); queries, keys, values, attention's result and (where kept) the activation's result and derivative, flat,
    in `inner`; the means and 1 / standard deviations of both norms and the scores' log-sum-exp, flat."""
    normed, mean1, rstd1 = layer_norm(x, norm1_weight, norm1_bias, eps)
    qkv = _project(normed, qkv_weight, qkv_bias).to(inner)
    q, k, v = _heads(qkv, heads, kv_heads)
    attended, lse = attention(q, k, v, True, q.shape[-1] ** -0.5)
    attended = attended.transpose(1, 2).flatten(2)
    middle = (_project(attended, proj_weight, proj_bias) + _wide(x)).to(x.dtype)
    normed, mean2, rstd2 = layer_norm(middle, norm2_weight, norm2_bias, eps)
    hidden = _project(normed, fc_weight, fc_bias)
    hidden, slope = (_activate(hidden, activation).to(inner), _slope(hidden, activation).to(inner))
    y = (_project(hidden, out_weight, out_bias) + _wide(middle)).to(x.dtype)
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

    dactivated, dout, dout_bias = _project_backward(grad, hidden, out_weight)
    dhidden = (dactivated * _wide(slope)).to(inner)
    normed = layer_norm(middle, norm2_weight, norm2_bias, eps)[0]
    dnormed, dfc, dfc_bias = _project_backward(dhidden, normed, fc_weight)
    dmiddle, dnorm2, dnorm2_bias = layer_norm_backward(dnormed, _wide(middle), norm2_weight, mean2, rstd2, True)
    dmiddle = dmiddle + _wide(grad)

    dattended, dproj, dproj_bias = _project_backward(dmiddle, attended, proj_weight)
    q, k, v = _heads(qkv, heads, kv_heads)
    dattended, attended = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (dattended.to(inner), attended))
    dq, dk, dv = attention_backward(dattended, q, k, v, attended, lse, True, q.shape[-1] ** -0.5)
    dqkv = torch.cat([part.transpose(1, 2) for part in (dq, dk, dv)], dim=2).flatten(2)
    normed = layer_norm(x, norm1_weight, norm1_bias, eps)[0]
    dnormed, dqkv_weight, dqkv_bias = _project_backward(dqkv, normed, qkv_weight)
    dx, dnorm1, dnorm1_bias = layer_norm_backward(dnormed, _wide(x), norm1_weight, mean1, rstd1, True)

    pairs = (
        (dnorm1, norm1_weight), (dnorm1_bias, norm1_bias), (dqkv_weight, qkv_weight), (dqkv_bias, qkv_bias),
        (dproj, proj_weight), (dproj_bias, proj_bias), (dnorm2, norm2_weight), (dnorm2_bias, norm2_bias),
        (dfc, fc_weight), (dfc_bias, fc_bias), (dout, out_weight), (dout_bias, out_bias),
    )  # fmt: skip
    gradients = [x.new_empty(0) if p is None or not needs_params else d.to(p.dtype).contiguous() for d, p in pairs]
    return [(dx + dmiddle).to(x.dtype).contiguous(), *gradients]


# ---- optimizer: AdamW, arXiv 1711.05101, algorithm 2


def grad_norm(grads: list[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients together, a float64 scalar on the CPU."""
    return torch.stack([g.double().square().sum() for g in grads]).sum().sqrt().cpu()


def adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    weight_decays: list[float],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    grad_scale: float,
    step: int,
    shadows: Sequence[Tensor] = (),
    zero_grads: bool = False,
) -> None:
    """One update of all parameters and both moments in place; `step` is 1 for the first."""
    for p, grad, m, v, decay in zip(params, grads, exp_avgs, exp_avg_sqs, weight_decays, strict=True):
        g = grad * grad_scale
        p.mul_(1 - lr * decay)
        m.add_((g - m) * (1 - beta1))
        v.mul_(beta2).add_((1 - beta2) * g * g)
        p.sub_(lr / (1 - beta1**step) * m / (v.sqrt() / math.sqrt(1 - beta2**step) + eps))
    for shadow, p in zip(shadows, params, strict=False):
        shadow.copy_(p)
    if zero_grads:
        for grad in grads:
            grad.zero_()
