"""GPT: a decoder-only transformer with norms before the blocks' halves.

    x_0     = dropout(wte[idx] + wpe[position])
    x'_l    = x_l  + attention(norm(x_l))
    x_{l+1} = x'_l + mlp(norm(x'_l))
    logits  = norm(x_L) wte^T

By default the architecture is GPT-2's (Radford et al., 2019, "Language Models are Unsupervised Multitask Learners", 2.3). The
configuration turns it into Llama's (arXiv:2302.13971): RMS norms, rotary positions in the place of `wpe`, a gated MLP, no biases, a
head of its own. Keys and values may be shared between query heads (n_kv_head). Dropout acts on the embeddings and on the output of
both halves of a block; there is none on the attention probabilities. A tied head has no weight of its own: it reads `wte.weight`,
which a state_dict therefore holds once.

Not here: relative position biases, sliding windows, mixtures of experts.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, cast

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastgpt import ops
from fastgpt.model.config import GPTConfig
from fastgpt.model.init import init_weights
from fastgpt.model.rope import rope_tables
from fastgpt.nn import ACTIVATIONS, MLP, CausalSelfAttention, Embedding, LayerCache, LayerNorm, RMSNorm
from fastgpt.ops.transformer_block import covers

if TYPE_CHECKING:
    from fastgpt.tokenizer import Tokenizer


class Cache(Protocol):
    """What the model needs of a cache of keys and values; fastgpt.infer.KVCache supplies it."""

    @property
    def length(self) -> int:
        """Tokens cached so far: the position of the next one."""
        ...

    @property
    def layers(self) -> Sequence[LayerCache]:
        """One cache a block."""
        ...


def _has_hooks(module: torch.nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _positions(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """0 to n - 1 for each n of lengths, one after the other, (sum of lengths,) int64."""
    return torch.cat([torch.arange(n, device=device) for n in lengths])


def _norm(config: GPTConfig) -> LayerNorm | RMSNorm:
    """One norm of the residual stream."""
    if config.norm == "rms_norm":
        return RMSNorm(config.n_embd, eps=config.norm_eps)
    return LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.has_bias("norm"))


_WHOLE = (LayerNorm, torch.nn.Linear, torch.nn.Linear) * 2  # the parts of a block that is one op


class Block(torch.nn.Module):
    """One block: causal self-attention, then the MLP, each behind a norm and added to the residual stream.

    Shapes: (B, T, C) to (B, T, C). Under autocast the residual stream keeps the parameters' dtype.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C, dropout = config.n_embd, config.dropout
        self.ln_1 = _norm(config)
        self.attn = CausalSelfAttention(
            C,
            config.n_head,
            n_kv_head=config.n_kv_head,
            bias=config.bias,
            qkv_bias=config.qkv_bias,
            dropout=dropout,
        )
        self.ln_2 = _norm(config)
        self.mlp = MLP(C, config.n_hidden, activation=config.activation, bias=config.has_bias("mlp"), dropout=dropout)

    def forward(
        self,
        x: torch.Tensor,
        cache: LayerCache | None = None,
        rope: tuple[torch.Tensor, torch.Tensor] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> torch.Tensor:
        if cache is None and rope is None and lengths is None and covers(x):
            parts = self._whole_parts()
            if parts is not None:
                return self._in_one_call(x, parts)
        x = x + self.attn(self.ln_1(x), cache, rope, lengths)  # (B, T, C)
        return x + self.mlp(self.ln_2(x))  # (B, T, C)

    def _whole_parts(self) -> tuple[torch.nn.Module, ...] | None:
        """Norms and linear layers in order, where they are what the constructor made, so that one op may stand for all of them: no
        other module in the place of one (LoRA), no hook that expects to see its result, one probability of dropout. Else None."""
        attn, mlp = self.attn, self.mlp
        if (
            type(attn) is not CausalSelfAttention
            or type(mlp) is not MLP
            or mlp.activation not in ACTIVATIONS
            or (self.training and attn.dropout != mlp.dropout)
        ):
            return None
        parts = (self.ln_1, attn.c_attn, attn.c_proj, self.ln_2, mlp.c_fc, mlp.c_proj)
        if tuple(map(type, parts)) != _WHOLE or any(map(_has_hooks, (attn, mlp, *parts))):
            return None
        return parts

    def _in_one_call(self, x: torch.Tensor, parts: tuple[torch.nn.Module, ...]) -> torch.Tensor:
        params = [part._parameters[name] for part in parts for name in ("weight", "bias")]
        attn, mlp, ln_1 = self.attn, self.mlp, cast(LayerNorm, parts[0])
        heads, kv_heads, _ = attn.heads
        dropout = attn.dropout if self.training else 0.0
        return ops.transformer_block(
            x, params, n_head=heads, n_kv_head=kv_heads, activation=mlp.activation, eps=ln_1.eps, dropout=dropout
        )


class GPT(torch.nn.Module):
    """A GPT with the weights of `config.init`, drawn from torch's default generator (seed it with torch.manual_seed).

    Args:
        config: a GPTConfig; kept as `model.config`.

    Attributes:
        activation_checkpointing: whether training keeps each block's input alone and computes the block again in the backward pass
            (arXiv:1604.06174): less memory, about a third more work, the same gradients. False at first.

    Example:
        >>> model = GPT(GPTConfig(vocab_size=65, block_size=64, n_layer=2, n_head=2, n_embd=16))
        >>> logits, loss = model(torch.zeros(3, 8, dtype=torch.int64))
        >>> logits.shape, loss
        (torch.Size([3, 1, 65]), None)
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        # Made without memory, then allocated once: torch's own starting weights would be drawn only to be overwritten.
        with torch.device("meta"):
            self.wte = Embedding(config.vocab_size, config.n_embd)
            if config.position == "learned":
                self.wpe = torch.nn.Embedding(config.block_size, config.n_embd)
            self.h = torch.nn.ModuleList(Block(config) for _ in range(config.n_layer))
            self.ln_f = _norm(config)
            if not config.tied_head:
                self.lm_head = torch.nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # Constants and not buffers, so that `model.bfloat16()` does not round the angles.
        self._rope = rope_tables(config) if config.position == "rope" else None
        if torch.get_default_device().type != "meta":
            self.to_empty(device=torch.get_default_device())
            init_weights(self, config.init)

    def forward(
        self,
        idx: torch.Tensor,
        targets: torch.Tensor | None = None,
        cache: Cache | None = None,
        *,
        all_logits: bool = False,
        need_logits: bool = True,
        lengths: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Logits, and with targets the mean cross-entropy.

        Args:
            idx: token ids, (B, T) int64 or int32, each below vocab_size.
            targets: the tokens to predict, (B, T) int64; positions holding -100 do not count.
            cache: keys and values of the tokens before idx, which then start at position cache.length; idx is appended
                to it.
            all_logits: without targets, return the logits of every position rather than of the last one only.

            lengths: of several sequences that stand one after the other in idx, (1, T) with T their sum, each at most block_size: each
                begins at position 0 and attends to itself only, as if it had a row of its own, and no padding is computed.
            need_logits: with targets, False leaves the logits out (None): loss and gradients are then made a part of them
                at a time (ops.linear_cross_entropy), in less memory and time. For training and evaluation.

        Returns:
            (logits, loss): logits (B, T, V) and a scalar loss in nats a token where targets are given; else logits (B,
            1, V), or (B, T, V) with all_logits, and None. Logits have the parameters' dtype, or the autocast dtype
            under autocast.

        Raises:
            ValueError: idx is not (B, T) with T >= 1, or its end lies beyond block_size, or targets have another shape, or lengths do
                not fit.
            IndexError: a token id that is negative or not below vocab_size (raised by torch, on the CPU).
        """
        if targets is not None and targets.shape != idx.shape:
            raise ValueError(f"targets: got shape {tuple(targets.shape)}; accepted: that of idx, {tuple(idx.shape)}")
        x = self._residual(idx, cache, lengths)  # (B, T, C)
        if targets is None and not all_logits:
            x = x[:, -1:]  # (B, 1, C): the head is most of a small model's work
        x = self.ln_f(x)
        if targets is not None and not need_logits:
            rows = x.view(-1, x.shape[-1])
            return None, ops.linear_cross_entropy(rows, self.head_weight, targets.reshape(-1))
        logits = F.linear(x, self.head_weight)  # (B, T, V)
        if targets is None:
            return logits, None
        return logits, ops.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))

    def features(self, idx: torch.Tensor) -> torch.Tensor:
        """What the head reads: (B, T, C) after the final norm, of (B, T) token ids.

        Raises:
            ValueError, IndexError: as forward.
        """
        return self.ln_f(self._residual(idx, None))

    def _check_lengths(self, idx: torch.Tensor, cache: Cache | None, lengths: Sequence[int]) -> None:
        block_size, good = self.config.block_size, bool(lengths) and min(lengths) > 0
        if (
            cache is not None
            or idx.shape[0] != 1
            or not good
            or sum(lengths) != idx.shape[1]
            or max(lengths) > block_size
        ):
            raise ValueError(
                f"lengths: got {list(lengths)} for idx {tuple(idx.shape)}{' and a cache' if cache is not None else ''}; accepted: "
                f"lengths from 1 to block_size = {block_size} that sum to T of an idx (1, T), and no cache"
            )

    def _residual(self, idx: torch.Tensor, cache: Cache | None, lengths: Sequence[int] | None = None) -> torch.Tensor:
        """The residual stream (B, T, C) after the last block."""
        if idx.dim() != 2 or idx.shape[1] == 0:
            raise ValueError(f"idx: got shape {tuple(idx.shape)}; accepted: (B, T) with T of at least 1")
        T = idx.shape[1]
        start = 0 if cache is None else cache.length
        if lengths is not None:
            self._check_lengths(idx, cache, lengths)
        elif start + T > self.config.block_size:
            cached = f" after {start} cached" if start else ""
            raise ValueError(f"idx: got {T} tokens{cached}; accepted: at most block_size = {self.config.block_size}")

        x = self.wte(idx)  # (B, T, C)
        if self._rope is None:
            apart = None if lengths is None else _positions(lengths, idx.device)
            x = x + (self.wpe.weight[start : start + T] if apart is None else self.wpe(apart))  # (B, T, C) + (T, C)
        rope = self._turns(start, T, lengths)
        x = ops.dropout(x, self.config.dropout, self.training)
        if cache is None:
            again = self.activation_checkpointing and self.training and torch.is_grad_enabled()
            for block in self.h:
                inputs = (x, None, rope, lengths)
                x = checkpoint(block, *inputs, use_reentrant=False) if again else block(*inputs)  # (B, T, C)
        else:
            for block, layer_cache in zip(self.h, cache.layers, strict=True):
                x = block(x, layer_cache, rope)  # (B, T, C)
        return x

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | os.PathLike[str],
        *,
        block_size: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "GPT":
        """Other libraries' models, in evaluation mode.

        Args:
            path_or_name: a folder of Hugging Face's (GPT-2, Llama, Mistral or Qwen2; safetensors or bin), a checkpoint of nanoGPT's
                train.py, a .gguf file, or what `save_model` wrote; or a name on the Hugging Face hub, which is downloaded.
            block_size: a shorter context than the model's.
            dtype: of the weights, whatever the file's.

        Raises:
            UserError: no such file, or a model that GPT is not; the message says what differs.

        Example:
            >>> model.save_pretrained("folder")
            >>> GPT.from_pretrained("folder").n_params() == model.n_params()
            True
        """
        from fastgpt.model.huggingface import from_pretrained

        return from_pretrained(path_or_name, block_size, dtype)

    def save_pretrained(self, folder: str | os.PathLike[str], tokenizer: "Tokenizer | None" = None) -> None:
        """Writes a folder that transformers loads to the same logits: config.json, model.safetensors and, with a tokenizer,
        tokenizer.json.

        Raises:
            UserError: a configuration that no family of transformers has, or a folder that cannot be written.
        """
        from fastgpt.model.huggingface import save_huggingface

        save_huggingface(self, folder, tokenizer)

    def _turns(
        self, start: int, length: int, lengths: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(cos, sin) of positions start to start + length, or of those of each sequence of lengths, (length, D / 2) each; None where
        positions are learned."""
        if self._rope is None:
            return None
        if self._rope[0].device != self.device:
            self._rope = (self._rope[0].to(self.device), self._rope[1].to(self.device))
        cos, sin = self._rope
        if lengths is not None:
            positions = _positions(lengths, self.device)
            return cos[positions], sin[positions]
        return cos[start : start + length], sin[start : start + length]

    @property
    def head_weight(self) -> torch.Tensor:
        """The head's weight, (V, C): the token embedding's where it is tied."""
        return self.wte.weight if self.config.tied_head else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.wte.weight.device

    def n_params(self, *, positions: bool = True) -> int:
        """The number of weights; a tied head's are the token embedding's and count once. Without `positions`, less the
        position embedding where there is one."""
        total = sum(parameter.numel() for parameter in self.parameters())
        return total if positions or self._rope is not None else total - self.wpe.weight.numel()

    def flops_per_token(self, n_tokens: int | None = None) -> int:
        """Floating-point operations of one token's forward and backward pass in a sequence of n_tokens (block_size
        where None).

        6 for every weight that multiplies (two forward, four backward: the matrices of the blocks and the head) and 12
        n_layer n_embd n_tokens for the scores and the weighted sum, as in arXiv:2204.02311, appendix B: full attention,
        so that causal attention is counted twice over. Norms, activations and the embeddings' look-ups are not counted.
        """
        n_tokens = self.config.block_size if n_tokens is None else n_tokens
        matrices = sum(p.numel() for p in self.h.parameters() if p.dim() == 2) + self.head_weight.numel()
        return 6 * matrices + 12 * self.config.n_layer * self.config.n_embd * n_tokens
