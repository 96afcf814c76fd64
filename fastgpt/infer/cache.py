"""KVCache: the keys and values of the tokens already read, so that each new token costs one position instead of the
whole context.

One tensor for keys and one for values in every layer, (B, H_kv, capacity, D). They are allocated with the first tokens,
in the dtype and on the device of those, and grow by doubling, up to max_tokens; appending copies the new positions only
and hands out views. At full length the cache holds 2 n_layer n_kv_head head_dim max_tokens numbers a sequence.

The positions of a model with learned positions are fixed once cached, so a full cache cannot slide; `reset` it and read
the tokens that matter again (fastgpt.infer.generate does).

No gradients pass through a cache, and sequences of one batch have one length.
"""

import torch

from fastgpt.model import GPTConfig

_FIRST_CAPACITY = 64


class LayerKVCache:
    """The keys and values of one layer; see KVCache."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.length = 0
        self._key: torch.Tensor | None = None
        self._value: torch.Tensor | None = None

    def append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds positions to the end.

        Args:
            key, value: (B, H_kv, T_new, D), of the same dtype and device as those before.

        Returns:
            All keys and all values so far, views of (B, H_kv, T_all, D), valid until the next append that grows the
            storage.

        Raises:
            ValueError: more than max_tokens positions, or another batch, head count, width, dtype or device than
                before.
        """
        start, end = self.length, self.length + key.shape[2]
        if end > self.max_tokens:
            raise ValueError(
                f"key: got {key.shape[2]} tokens after {start} cached; accepted: max_tokens = {self.max_tokens} in all"
            )
        if self._key is None or self._value is None or end > self._key.shape[2]:
            self._key, self._value = self._grown(self._key, key, end), self._grown(self._value, value, end)
        for name, new, stored in (("key", key, self._key), ("value", value, self._value)):
            if _kind(new) != _kind(stored):
                raise ValueError(f"{name}: got B, H_kv, D, dtype, device {_kind(new)}; the cache holds {_kind(stored)}")
            stored[:, :, start:end] = new.detach()
        self.length = end
        return self._key[:, :, :end], self._value[:, :, :end]

    def _grown(self, stored: torch.Tensor | None, new: torch.Tensor, needed: int) -> torch.Tensor:
        """Storage for at least `needed` positions, with what is cached copied over."""
        like, capacity = (new, 0) if stored is None else (stored, stored.shape[2])
        capacity = min(max(needed, 2 * capacity, _FIRST_CAPACITY), self.max_tokens)
        grown = like.new_empty(like.shape[0], like.shape[1], capacity, like.shape[3])
        if stored is not None:
            grown[:, :, : self.length] = stored[:, :, : self.length]
        return grown


def _kind(tensor: torch.Tensor) -> tuple[object, ...]:
    """What must not change between appends: B, H_kv, D, dtype, device."""
    return (tensor.shape[0], tensor.shape[1], tensor.shape[3], tensor.dtype, tensor.device)


class KVCache:
    """The keys and values of every layer of a GPT, for `model(idx, cache=cache)`.

    Args:
        config: the model's configuration.
        max_tokens: positions it may hold; block_size where None.

    Attributes:
        layers: one LayerKVCache a block.
        max_tokens: positions it may hold.

    Raises:
        ValueError: max_tokens is below 1 or above block_size.

    Example:
        >>> cache = KVCache(model.config)
        >>> logits, _ = model(torch.tensor([[5, 3, 8]]), cache=cache)  # reads three tokens and keeps them
        >>> logits, _ = model(torch.tensor([[2]]), cache=cache)  # costs one position
        >>> cache.length
        4
    """

    def __init__(self, config: GPTConfig, max_tokens: int | None = None) -> None:
        max_tokens = config.block_size if max_tokens is None else max_tokens
        if not 1 <= max_tokens <= config.block_size:
            raise ValueError(f"max_tokens: got {max_tokens}; accepted: 1 to block_size = {config.block_size}")
        self.max_tokens = max_tokens
        self.layers = [LayerKVCache(max_tokens) for _ in range(config.n_layer)]

    @property
    def length(self) -> int:
        """Tokens held: the position of the next one."""
        return self.layers[0].length

    def truncate(self, length: int) -> None:
        """Forgets everything from position `length` on; the storage stays.

        Raises:
            ValueError: length is negative or more than the cache holds.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"length: got {length}; accepted: 0 to {self.length}, what the cache holds")
        for layer in self.layers:
            layer.length = length

    def reset(self) -> None:
        """Forgets everything; the storage stays."""
        for layer in self.layers:
            layer.length = 0

    @property
    def nbytes(self) -> int:
        """Bytes of storage allocated now."""
        tensors = [t for layer in self.layers for t in (layer._key, layer._value) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)
