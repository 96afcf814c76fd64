"""Several processes that train one model, as `torchrun` starts them.

    ddp    every process has the whole model; gradients are averaged while the backward pass runs (arXiv:2006.15704)
    fsdp   weights, gradients and moments are divided over the processes, a block's weights gathered for its own forward and backward
           pass (FSDP2, `torch.distributed.fsdp.fully_shard`; arXiv:2304.11277)

Each process reads its own rows of every batch (`fastgpt.data.Loader`), so N of them do what one would with the same batch, up to the
order of sums. Where gradients are accumulated, they are exchanged in the last part of a step only. NCCL between GPUs, gloo between
CPUs.

Anything that a clock or a signal decides is decided by one process for all (`Group.agree`, `Group.sum`): processes that part ways wait
for one another for ever.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch

from fastgpt.errors import SaidElsewhere, UserError

T = TypeVar("T")

# What backends say when the process at the other end is gone. They raise plain RuntimeErrors, from Python and from autograd's threads.
_LOST = (
    "connection closed by peer",
    "connection reset",
    "broken pipe",
    "connection refused",
    "timed out",
    "nccl",
    "gloo",
)


@dataclass(frozen=True)
class Group:
    """The processes of a job and this one's place among them. `Group()` is a process alone, for which every method is free.

    Attributes:
        rank: which of the processes this is.
        world_size: how many there are.
        local_rank: which of this machine's.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def agree(self, value: T) -> T:
        """Rank 0's value, for all."""
        if self.world_size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def first(self, action: Callable[[], T]) -> T:
        """Rank 0's result of `action`, which the others wait for.

        Raises:
            UserError: rank 0's error, on the others as SaidElsewhere. What else rank 0 meets is raised there as it is.
        """
        if self.world_size == 1:
            return action()
        result: T | None = None
        failure: Exception | None = None
        if self.main:
            try:
                result = action()
            except Exception as error:
                failure = error
        told, result = self.agree((None if failure is None else str(failure), result))
        if failure is not None:
            raise failure
        if told is not None:
            raise SaidElsewhere(told)
        return result  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank, for all."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over the ranks, in place."""
        if self.world_size > 1:
            torch.distributed.all_reduce(values)
        return values


def job_size() -> tuple[int, int, int]:
    """(how many processes, which of them, which of this machine's), as torchrun's environment says; (1, 0, 0) without it.

    Raises:
        UserError: something else stands there.
    """
    names = (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))
    try:
        size, rank, local = (int(os.environ.get(name, default)) for name, default in names)
    except ValueError as error:
        raise UserError(f"the environment is not torchrun's: {error}; accepted are whole numbers") from error
    return size, rank, local


@contextmanager
def joined(device: str = "auto") -> Iterator[Group]:
    """The group of this process: what torchrun's environment says, or a process alone.

    Args:
        device: as `train.device`; decides the backend.

    Raises:
        UserError: an incomplete environment, or processes that do not find one another.
    """
    size, rank, local = job_size()
    if size == 1:
        yield Group()
        return
    import torch.distributed as dist

    on_cuda = device != "cpu" and torch.cuda.is_available()
    if on_cuda:
        if local >= torch.cuda.device_count():
            raise UserError(
                f"process {local} of this machine has no GPU of its own: torch sees {torch.cuda.device_count()}; "
                "give torchrun --nproc-per-node at most that many, or --device cpu"
            )
        torch.cuda.set_device(local)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the {size} processes do not find one another: {_line(error)}; start them by torchrun"
        ) from error
    try:
        yield Group(rank, size, local)
    finally:
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process of a job with an exit code, without the interpreter's own end.

    gloo's threads may outlive their group (FSDP keeps it), and one that lets go of a tensor while the interpreter is being taken down
    aborts the process: a finished job would count as failed (https://github.com/pytorch/pytorch/issues/190489).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def device_of(device: torch.device, group: Group) -> torch.device:
    """The process's own GPU, where a job of several is on GPUs."""
    return torch.device("cuda", group.local_rank) if device.type == "cuda" and group.world_size > 1 else device


def lost_peer(error: BaseException) -> bool:
    """Whether this error says that another process of the job has ended."""
    words = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in words for word in _LOST)


def _line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0]


def launcher(group: Group) -> str:
    """How such a job is started."""
    return "fastgpt" if group.world_size == 1 else f"torchrun --nproc-per-node={group.world_size} -m fastgpt"


def explain_loss(error: BaseException, group: Group, folder: os.PathLike[str] | str) -> UserError:
    """The message of a job that has lost a process."""
    return UserError(
        f"rank {group.rank} of {group.world_size} stops: another process of the job has ended or cannot be reached "
        f"({_line(error)}). Only the steps since the last checkpoint are lost. To go on, with any number of processes: "
        f"{launcher(group)} train --resume {folder}"
    )


class Parallel:
    """A model spread over a group.

    Args:
        model: a GPT on its device, with the same weights on every rank; fsdp divides it in place.
        group: the processes.
        kind: "ddp" or "fsdp".

    Example:
        >>> parallel = Parallel(model, Group(), "ddp")  # a process alone: the model as it is
        >>> parallel.forward is model
        True
    """

    def __init__(self, model: torch.nn.Module, group: Group, kind: str) -> None:
        self.model, self.group = model, group
        self.forward: Any = model
        self.sharded = group.world_size > 1 and kind == "fsdp"
        if self.sharded:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(next(model.parameters()).device.type, (group.world_size,))
            for block in model.h:  # type: ignore[union-attr]
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)  # what is in no block: embeddings, the last norm, the head
        elif group.world_size > 1:
            from torch.nn.parallel import DistributedDataParallel

            ids = [group.local_rank] if next(model.parameters()).is_cuda else None
            self.forward = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)

    def part(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of one part of a step; gradients are exchanged in the last one only."""
        if self.sharded:
            self.forward.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last or self.group.world_size == 1 else self.forward.no_sync()

    def weights(self) -> dict[str, torch.Tensor]:
        """The whole weights by name, on the CPU; every rank must call it, and it is empty on all but rank 0.

        Gathered one tensor at a time, so that a GPU never holds more than its share and one of them.
        """
        whole = {}
        for name, tensor in self.model.state_dict().items():
            full = tensor.full_tensor() if self.sharded else tensor
            if self.group.main:
                whole[name] = full.detach().cpu()
        return whole


def shares(
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]], group: Group
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """(x, y, weight) of each evaluation batch: this rank's rows, and the number of tokens they count for.

    Every rank gets as many batches, because a divided model needs all ranks in each forward pass: a rank without a row of its own in a
    short batch gets one that counts for nothing.
    """
    for x, y in batches:
        mine = slice(group.rank, None, group.world_size)
        if group.rank < len(x):
            yield x[mine], y[mine], y[mine].numel()
        else:
            yield x[:1], y[:1], 0
