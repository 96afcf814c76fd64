"""Checkpoints that a kill cannot break, and from which a run goes on exactly.

    checkpoints/step-000250/model.safetensors      the weights (fastgpt.model.save_model)
                            training.safetensors   AdamW's moments by parameter name, its count of steps; random-number states
                            state.json             step, plan, best loss, ...; and the size and CRC-32 of the other two files
    checkpoints/latest                             one line, the folder's name

Writing goes: a temporary folder, every file flushed, a rename to the final name, then the pointer replaced, then older checkpoints
removed. So at any moment `latest` names a complete checkpoint. Reading checks sizes and CRCs first: a damaged checkpoint is reported,
never half loaded.

Of several processes rank 0 writes. Where the model is divided over them (fastgpt.train.sharded), a folder `shards` that all of them
write stands in the place of model.safetensors and of the moments. Either kind is read by any number of processes, divided or not.
"""

import json
import os
import shutil
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fastgpt.errors import UserError
from fastgpt.model import GPT, GPTConfig, load_weights, save_model
from fastgpt.model.weights import check_config
from fastgpt.train.files import fsync_path, replace_text
from fastgpt.train.optimizer import AdamW
from fastgpt.train.parallel import Group
from fastgpt.train.sharded import FOLDER, is_sharded, like, load_shards, save_shards

FORMAT = "fastgpt-checkpoint"
FILES = ("model.safetensors", "training.safetensors")
ALONE = Group()


@dataclass
class TrainState:
    """What a run knows besides weights and optimizer, all of it in state.json.

    Attributes:
        step: optimizer steps done.
        max_steps: the run's length, once known (a time budget becomes steps after its first seconds).
        eval_interval: steps between evaluations, once known.
        best_loss: lowest validation loss so far.
        best_step: where it was.
        train_loss_at_best: the training loss measured with it.
        evals_without_better: evaluations since then.
        elapsed_s: seconds of training so far, evaluations included, over all resumes.
        warned_overfitting: the message that training and validation part ways was given.
        threads: CPU threads of the run; another number sums in another order.
    """

    step: int = 0
    max_steps: int | None = None
    eval_interval: int | None = None
    best_loss: float | None = None
    best_step: int = 0
    train_loss_at_best: float | None = None
    evals_without_better: int = 0
    elapsed_s: float = 0.0
    warned_overfitting: bool = False
    threads: int = 0

    def note(self, train_loss: float, val_loss: float) -> bool:
        """Take in an evaluation at this step; whether it is the best so far."""
        if self.best_loss is not None and val_loss >= self.best_loss:
            self.evals_without_better += 1
            return False
        self.best_loss, self.best_step, self.train_loss_at_best = val_loss, self.step, train_loss
        self.evals_without_better = 0
        return True


def _crc32(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(2**22):
            value = zlib.crc32(block, value)
    return value


def _optimizer_tensors(model: GPT, optimizer: AdamW) -> dict[str, torch.Tensor]:
    tensors = {"steps": torch.tensor(optimizer.steps)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not is_sharded(model):
            for key, value in optimizer.moments(parameter).items():
                tensors[f"{key}.{name}"] = value.cpu()
    return tensors


def _random_states(group: Group) -> dict[str, torch.Tensor]:
    """The random-number states of all ranks: rng.cpu and rng.cuda of rank 0, rng.cpu.1 and so on of the others."""
    mine = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        mine["rng.cuda"] = torch.cuda.get_rng_state()
    states = dict(mine)
    for rank, theirs in enumerate(group.gather(mine)):
        states |= {key if rank == 0 else f"{key}.{rank}": value for key, value in theirs.items()}
    return states


def _set_random_states(tensors: dict[str, torch.Tensor], group: Group) -> None:
    """This rank's states; where the ranks were more or fewer, rank 0's and others drawn from it."""
    ranks = sum(key.startswith("rng.cpu") for key in tensors)
    ending = f".{group.rank}" if group.rank and ranks == group.world_size else ""
    torch.set_rng_state(tensors[f"rng.cpu{ending}"])
    if f"rng.cuda{ending}" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors[f"rng.cuda{ending}"])
    if group.rank and not ending:
        torch.manual_seed(int(torch.randint(2**62, ())) + group.rank)


def save_checkpoint(
    run: Path, model: GPT, optimizer: AdamW, state: TrainState, *, keep: int = 2, group: Group = ALONE
) -> Path:
    """Write the checkpoint of `state.step` and point `latest` at it; every rank must call it.

    Args:
        run: the run folder, which all ranks see.
        model: its weights.
        optimizer: its moments.
        state: everything else.
        keep: how many checkpoints stay.
        group: the processes.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError, SafetensorError: it cannot be written; nothing changed.
    """
    folder = run / "checkpoints"
    final = folder / f"step-{state.step:06d}"
    temporary = folder / f".tmp-step-{state.step:06d}"
    random_states = _random_states(group)
    sharded = is_sharded(model)

    def prepare() -> None:
        folder.mkdir(exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()

    def finish() -> None:
        save_file(_optimizer_tensors(model, optimizer) | random_states, temporary / "training.safetensors")
        if not sharded:
            save_model(model, temporary / "model.safetensors")
        files = {}
        for path in sorted(path for path in temporary.rglob("*") if path.is_file()):
            fsync_path(path)
            name = path.relative_to(temporary).as_posix()
            files[name] = {"bytes": path.stat().st_size, "crc32": _crc32(path)}
        content = {"format": FORMAT, "version": 1, "state": asdict(state), "files": files}
        if sharded:
            content["model"] = model.config.to_dict()
        replace_text(temporary / "state.json", json.dumps(content, indent=2) + "\n")
        if final.exists():  # left by an attempt that this run has gone back behind
            old = folder / f".old-{final.name}"
            shutil.rmtree(old, ignore_errors=True)
            os.rename(final, old)
        os.rename(temporary, final)
        fsync_path(folder)
        replace_text(folder / "latest", final.name + "\n")

    try:
        group.first(prepare)
        if sharded:
            save_shards(temporary, model, optimizer)
        group.first(finish)
    except BaseException:
        if group.main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if group.main:
        _remove_old(folder, final, keep)
    return final


def _all(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    found = [path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def _remove_old(folder: Path, newest: Path, keep: int) -> None:
    """Keep the newest `keep` checkpoints up to `newest`; later ones belong to an attempt that this run has gone back behind."""
    steps = _all(folder)
    here = steps.index(newest) + 1
    for path in [*steps[: max(here - keep, 0)], *steps[here:], *folder.glob(".old-*"), *folder.glob(".tmp-*")]:
        shutil.rmtree(path, ignore_errors=True)


def latest_checkpoint(run: Path) -> Path | None:
    """The folder that `latest` names; where that is gone, the newest there is; None without any."""
    folder = run / "checkpoints"
    pointer = folder / "latest"
    if pointer.is_file():
        name = pointer.read_text(encoding="utf-8", errors="replace").strip()
        if name.startswith("step-") and (folder / name).is_dir():
            return folder / name
    steps = _all(folder)
    return steps[-1] if steps else None


def _damaged(folder: Path, reason: str) -> UserError:
    steps = _all(folder.parent)
    earlier = steps[: steps.index(folder)]
    way_out = f"remove that folder to go on from {earlier[-1].name}" if earlier else "there is no earlier one"
    return UserError(f"the checkpoint {folder} is damaged: {reason}; {way_out}")


def _read(folder: Path) -> tuple[TrainState, GPTConfig | None]:
    """The state of a checkpoint, and where its weights are in shards their model's configuration; all files are checked."""
    try:
        content = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise _damaged(folder, f"state.json cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise _damaged(folder, "state.json is not JSON") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f'{folder} is not a checkpoint of fastgpt (state.json has no "format": "{FORMAT}")')
    known = {item.name for item in fields(TrainState)}
    values, files = content.get("state"), content.get("files")
    if content.get("version") != 1 or not isinstance(values, dict) or set(values) != known or not files:
        raise UserError(f"{folder} was written by another version of fastgpt; this one reads version 1")
    in_shards = "model" in content
    needed = (FILES[1], f"{FOLDER}/.metadata") if in_shards else FILES
    for name in sorted({*files, *needed}):
        path, expected = folder / name, files.get(name, {"bytes": -1})
        size = path.stat().st_size if path.is_file() else 0
        if size != expected["bytes"]:
            raise _damaged(folder, f"{name} has {size:,} bytes instead of {expected['bytes']:,}")
        if _crc32(path) != expected["crc32"]:
            raise _damaged(folder, f"the content of {name} has changed")
    return TrainState(**values), GPTConfig.from_dict(content["model"]) if in_shards else None


def read_state(folder: Path) -> TrainState:
    """The state of a checkpoint, after checking that all its files are whole.

    Raises:
        UserError: a file is missing, cut short, changed, or no checkpoint of fastgpt.
    """
    return _read(folder)[0]


def load_checkpoint(folder: Path, model: GPT, optimizer: AdamW, group: Group = ALONE) -> TrainState:
    """Put a checkpoint's weights, moments and random-number states in place; returns the rest. Every rank must call it.

    Args:
        folder: the checkpoint, written by any number of processes.
        model: a GPT of the same configuration, already on its device, and divided if it is to be.
        optimizer: built over this model's parameters.
        group: the processes.

    Raises:
        UserError: damaged, foreign, or of a model with another configuration.
    """
    state, config = group.first(lambda: _read(folder))
    if config is None:
        load_weights(model, folder / "model.safetensors", like)
    else:
        check_config(config, model.config, folder)
        load_shards(folder, model, optimizer)
    try:
        tensors = load_file(folder / "training.safetensors")
    except (OSError, SafetensorError) as error:
        raise _damaged(folder, f"training.safetensors cannot be read ({error})") from error
    if config is None:
        _load_moments(folder, tensors, model, optimizer)
    optimizer.steps = int(tensors["steps"])
    _set_random_states(tensors, group)
    return state


@torch.no_grad()
def _load_moments(folder: Path, tensors: dict[str, torch.Tensor], model: GPT, optimizer: AdamW) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            for key, value in optimizer.moments(parameter).items():
                if f"{key}.{name}" not in tensors:
                    raise _damaged(folder, f"training.safetensors has no {key} for {name}")
                value.copy_(like(tensors[f"{key}.{name}"], value))
