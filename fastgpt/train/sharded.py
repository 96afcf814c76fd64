"""Checkpoints of a model that is divided over processes: torch.distributed.checkpoint.

Every rank writes what it holds, and any number of ranks, also one process alone, reads what it needs: the format knows where in the
whole tensor each part lies.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastgpt.train.optimizer import AdamW

FOLDER = "shards"


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether a model's weights are divided over processes, by `fully_shard`."""
    return hasattr(model, "reshard")


def divide_again(model: torch.nn.Module) -> None:
    """Give up what a forward pass without a backward one has gathered; until then the parameters are whole."""
    if is_sharded(model):
        model.reshard()  # type: ignore[operator]


def like(tensor: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
    """A whole tensor, which every rank has, divided as `pattern` is; as it is where that is whole."""
    if not hasattr(pattern, "to_local"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(pattern, DTensor)
    return distribute_tensor(
        tensor.to(pattern.device, pattern.dtype), pattern.device_mesh, pattern.placements, src_data_rank=None
    )


def _state(model: torch.nn.Module, optimizer: AdamW) -> dict[str, Any]:
    """Weights and moments by name, sharing their memory."""
    divide_again(model)
    state: dict[str, Any] = {f"weight.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            state |= {f"{key}.{name}": value for key, value in optimizer.moments(parameter).items()}
    return state


@contextmanager
def _plain_errors() -> Iterator[None]:
    """The first rank's own error in the place of CheckpointException, and no word about a process alone."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint")
            yield
    except CheckpointException as error:
        inner = next((found for found, _ in error.failures.values() if isinstance(found, Exception)), None)
        raise (error if inner is None else inner) from error


def save_shards(folder: Path, model: torch.nn.Module, optimizer: AdamW) -> None:
    """Write weights and moments below `folder`; every rank must call it.

    Raises:
        OSError: a rank cannot write.
    """
    import torch.distributed.checkpoint as dcp

    with _plain_errors():
        dcp.save(_state(model, optimizer), checkpoint_id=folder / FOLDER)


def load_shards(folder: Path, model: torch.nn.Module, optimizer: AdamW) -> None:
    """Put what `save_shards` wrote in place, into a model that is divided in any way or not at all; every rank must call it."""
    import torch.distributed.checkpoint as dcp

    with _plain_errors():
        dcp.load(_state(model, optimizer), checkpoint_id=folder / FOLDER)
