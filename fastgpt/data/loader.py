"""Batches from token files, as a pure function of the seed and the step.

A batch is (x, y): x the ids at positions p .. p+T-1, y the ids at p+1 .. p+T, T the block size.

    shuffle   the text is cut into blocks of T ids; every epoch reads each block once, in an order drawn from the seed and the
              epoch, and starts the first block at an offset of its own, so that the cuts fall elsewhere each time. After one
              epoch's worth of tokens all text has been read; of random crops 37 % (1/e) would not have been.
    random    p is uniform over all positions.

Draws come from a Philox generator keyed by the seed and counted by the epoch or the batch (Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3", SC11): no state runs on.

There is nothing to store and nothing to restore: after a resume the loader goes on exactly where it was because it is asked for the
next step. Validation reads fixed blocks spread evenly over the held-out text. The loader never shuffles text in memory and never
copies the file: each batch is gathered from the memory map and widened to int64 once.
"""

from collections.abc import Iterator

import numpy as np
import torch

from fastgpt.data.shards import Tokens
from fastgpt.errors import UserError


def _gather(tokens: Tokens, starts: np.ndarray, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, y), each (B, T) int64 and contiguous, for the given start positions."""
    windows = tokens[starts[:, None] + np.arange(block_size + 1)]  # (B, T + 1), the file's dtype
    pair = np.empty((2, len(starts), block_size), dtype=np.int64)
    pair[0], pair[1] = windows[:, :-1], windows[:, 1:]
    x, y = torch.from_numpy(pair)
    return x, y


def check_length(tokens: Tokens, block_size: int, what: str) -> None:
    """Raise UserError unless at least one block and its targets fit into `tokens`."""
    if len(tokens) < block_size + 1:
        raise UserError(
            f"the {what} text has {len(tokens):,} tokens, too few for model.block_size {block_size}; "
            f"give a longer text or a block size of at most {max(len(tokens) - 1, 0):,}"
        )


class Loader:
    """Training batches.

    Args:
        tokens: (n,) array of ids, usually a memory map.
        block_size: T, ids in a sequence.
        batch_size: B, sequences in a batch.
        seed: decides everything together with the step.
        order: "shuffle" or "random".
        rank, world_size: where several processes share the work, which of how many this is: each gets its own batch_size / world_size
            rows of every batch, so together they read what one process would, nothing twice, whatever their number.

    Raises:
        UserError: fewer than block_size + 1 tokens, or a batch that cannot be shared evenly.
        ValueError: another order, or a rank out of its range.

    Example:
        >>> loader = Loader(np.arange(100, dtype=np.uint16), block_size=8, batch_size=2, seed=1)
        >>> x, y = loader.batch(step=0)
        >>> tuple(x.shape), bool((y == x + 1).all())
        ((2, 8), True)
    """

    def __init__(
        self,
        tokens: Tokens,
        block_size: int,
        batch_size: int,
        seed: int,
        *,
        order: str = "shuffle",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_length(tokens, block_size, "training")
        if order not in ("shuffle", "random"):
            raise ValueError(f"order is {order!r}; accepted is 'shuffle' or 'random'")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; accepted is 0 to world_size - 1 = {world_size - 1}")
        if batch_size % world_size:
            raise UserError(f"train.batch_size is {batch_size}; accepted is a multiple of the {world_size} processes")
        self.rows = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self.tokens = tokens
        self.block_size = block_size
        self.batch_size = batch_size
        self.seed = seed
        self.order = order
        # One block fewer than fit, where there are several, leaves room for the offset that moves the cuts.
        self.n_blocks = max((len(tokens) - block_size) // block_size, 1)
        self._latest: tuple[int, np.ndarray] | None = None

    def _generator(self, counter: int, stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.seed, stream], counter=[0, 0, 0, counter]))

    def _starts_of_epoch(self, epoch: int) -> np.ndarray:
        """Start positions of all blocks in the order of one epoch; the latest epoch's is kept."""
        if self._latest is None or self._latest[0] != epoch:
            generator = self._generator(epoch, stream=1)
            room = len(self.tokens) - 1 - self.n_blocks * self.block_size
            offset = int(generator.integers(0, min(room, self.block_size - 1) + 1))
            self._latest = epoch, offset + self.block_size * generator.permutation(self.n_blocks)
        return self._latest[1]

    def batch(self, step: int, micro_step: int = 0, grad_accum_steps: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch of optimizer step `step`, part `micro_step` of `grad_accum_steps`: x and y, each (B / world_size, T)
        int64."""
        index = step * grad_accum_steps + micro_step
        if self.order == "random":
            highest = len(self.tokens) - self.block_size
            starts = self._generator(index, stream=0).integers(0, highest, size=self.batch_size)
            return _gather(self.tokens, starts[self.rows], self.block_size)
        starts = np.empty(self.batch_size, dtype=np.int64)
        for row in range(self.batch_size):  # a batch may straddle two epochs
            epoch, place = divmod(index * self.batch_size + row, self.n_blocks)
            starts[row] = self._starts_of_epoch(epoch)[place]
        return _gather(self.tokens, starts[self.rows], self.block_size)

    def steps_per_epoch(self, grad_accum_steps: int = 1) -> float:
        """Optimizer steps that read each block once."""
        return self.n_blocks / (self.batch_size * grad_accum_steps)


class EvalBatches:
    """Fixed blocks of a text, the same at every evaluation.

    Blocks of T ids follow one another without overlap; where the text holds more of them than asked for, the ones taken are spread
    evenly over it.

    Args:
        tokens: (n,) array of ids.
        block_size: T.
        batch_size: B; the last batch may be smaller.
        n_tokens: how many tokens to predict at most, rounded up to whole blocks.
        what: the text's name in an error.
    """

    def __init__(
        self, tokens: Tokens, block_size: int, batch_size: int, n_tokens: int, *, what: str = "validation"
    ) -> None:
        check_length(tokens, block_size, what)
        available = (len(tokens) - 1) // block_size
        wanted = min(available, -(-n_tokens // block_size))
        self.starts = np.arange(wanted, dtype=np.int64) * available // wanted * block_size
        self.tokens = tokens
        self.block_size = block_size
        self.batch_size = batch_size

    @property
    def n_tokens(self) -> int:
        """Number of predicted tokens."""
        return len(self.starts) * self.block_size

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for first in range(0, len(self.starts), self.batch_size):
            yield _gather(self.tokens, self.starts[first : first + self.batch_size], self.block_size)
