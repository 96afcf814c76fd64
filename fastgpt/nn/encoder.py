"""Drop-in forms of torch.nn.MultiheadAttention and torch.nn.TransformerEncoderLayer (arXiv:1706.03762).

Both derive from torch's classes: arguments, initial weights of a seed, state_dict keys and results are torch's. Attention without
probabilities asked for (need_weights=False) and without a mask, or with a causal one and is_causal=True, is `ops.attention`, whose
masks of dropout are not torch's; everything else goes to torch's own forward. So does small input on the
CPU (SMALLEST in fallback.py): there the way through Python costs more than our ops save.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import ops
from fastgpt.functional import scaled_dot_product_attention
from fastgpt.nn.fallback import is_small, log_fallback
from fastgpt.nn.linear import Linear
from fastgpt.nn.modules import LayerNorm


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention(embed_dim, num_heads, dropout=0.0, bias=True, ..., batch_first=False) on `ops.attention`.

    Args of forward:
        query, key, value: (T, B, C), with batch_first (B, T, C), or (T, C).
        need_weights: True, torch's default, makes the probabilities, and so does all of it in torch; give False.
        attn_mask with is_causal=True: stands for the causal mask, as in torch. Other masks go to torch.

    Returns:
        The result in the query's layout, and None (with need_weights torch's probabilities).

    Raises:
        What torch raises.

    Example:
        >>> x = torch.zeros(2, 5, 8)
        >>> MultiheadAttention(8, 2, batch_first=True)(x, x, x, need_weights=False)[0].shape
        torch.Size([2, 5, 8])
    """

    def _uncovered(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, weights: bool, mask: Tensor | None, causal: bool
    ) -> str | None:  # fmt: skip
        if weights:
            return "need_weights=True"
        if padding is not None or (mask is not None) != causal:
            return "a mask"
        if self.bias_k is not None or self.bias_v is not None or self.add_zero_attn:
            return "bias_k, bias_v or add_zero_attn"
        batch = slice(0, 1) if self.batch_first else slice(1, 2)
        if (
            query.is_nested
            or key.is_nested
            or query.dim() not in (2, 3)
            or not query.dim() == key.dim() == value.dim()
            or key.shape[:-1] != value.shape[:-1]
            or (query.dim() == 3 and query.shape[batch] != key.shape[batch])
            or (query.shape[-1], key.shape[-1], value.shape[-1]) != (self.embed_dim, self.kdim, self.vdim)
        ):
            return "shapes that torch judges"
        return None

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is not None and query is key and key is value:
            return F.linear(query, weight, bias).chunk(3, dim=-1)
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if weight is None else weight.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        what = self._uncovered(query, key, value, key_padding_mask, need_weights, attn_mask, is_causal)
        if what is not None or is_small(query, "layer"):
            if what is not None:
                log_fallback(f"MultiheadAttention with {what}")
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        merged = query.shape
        parts = self._projected(query, key, value)
        if query.dim() == 2:
            parts = tuple(x[None] for x in parts)
        elif not self.batch_first:
            parts = tuple(x.transpose(0, 1) for x in parts)
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in parts)  # (B, H, T, D)
        p = self.dropout if self.training else 0.0
        y = scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=is_causal).transpose(1, 2).flatten(2)
        if query.dim() == 3 and not self.batch_first:
            y = y.transpose(0, 1)
        y = F.linear(y.reshape(merged), self.out_proj.weight, self.out_proj.bias)
        return y, None


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer(d_model, nhead, dim_feedforward=2048, dropout=0.1, activation=F.relu, ...) on our attention,
    norms and gelu; dropout of other than attention's weights is torch's.

    Args of forward:
        src: (T, B, C), with batch_first (B, T, C), or (T, C).
        src_mask with is_causal=True stands for the causal mask; other masks, and padding, go to torch's own forward.

    Returns:
        A tensor of src's shape and dtype.

    Raises:
        What torch raises.

    Example:
        >>> TransformerEncoderLayer(8, 2, 16, batch_first=True)(torch.zeros(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        # Classes are exchanged rather than modules made anew: the weights are those that torch draws.
        self.self_attn.__class__ = MultiheadAttention
        for norm in (self.norm1, self.norm2):
            norm.__class__ = LayerNorm
        for linear in (self.linear1, self.linear2):
            linear.__class__ = Linear

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if (
            src_key_padding_mask is not None
            or (src_mask is not None) != is_causal
            or src.is_nested
            or is_small(src, "layer")
        ):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        if self.norm_first:
            x = src + self._sa_block(self.norm1(src), src_mask, None, is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(src + self._sa_block(src, src_mask, None, is_causal))
        return self.norm2(x + self._ff_block(x))

    def _ff_block(self, x: Tensor) -> Tensor:
        if self.activation is not F.gelu or is_small(x, "layer"):
            return super()._ff_block(x)
        return self.dropout2(self.linear2(self.dropout(ops.gelu(self.linear1(x)))))
