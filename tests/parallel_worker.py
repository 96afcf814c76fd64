"""What each process of a test's torchrun job does: the runs of a plan, one after the other.

    torchrun --nproc-per-node=2 parallel_worker.py PLAN.json

PLAN is a list of {"folder", "stop", "options"}: open the run, train until step `stop` (then as after Ctrl-C) or to the end. Rank 0
writes what it measured beside the plan: for each entry the loss and the gradient's norm of every step, and how often gradients were
exchanged.
"""

import json
import signal
import sys
from pathlib import Path

import torch

from fastgpt.train import Trainer, open_run
from fastgpt.train.parallel import joined, leave


def train(entry: dict, group) -> dict:
    run = open_run(Path(entry["folder"]), [], entry["options"])
    trainer = Trainer(run, print, group)
    measured: dict = {"losses": [], "norms": [], "exchanges": 0, "started_at": trainer.state.step}
    if entry.get("best") is not None:  # no evaluation will be better, so none writes weights
        trainer.state.best_loss = entry["best"]
    step, grad_norm = trainer._step, trainer.optimizer.grad_norm

    def noted(learning_rate: float) -> float | None:
        loss = step(learning_rate)
        measured["losses"].append(loss)
        if trainer.state.step + 1 == entry["stop"]:
            trainer.signals.number, trainer._stop = signal.SIGINT, True
        return loss

    def norm() -> float:
        measured["norms"].append(grad_norm())
        return measured["norms"][-1]

    def counted(state: object, bucket: torch.distributed.GradBucket):
        measured["exchanges"] += 1
        work = torch.distributed.all_reduce(bucket.buffer() / group.world_size, async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    trainer._step, trainer.optimizer.grad_norm = noted, norm
    if hasattr(trainer.parallel.forward, "register_comm_hook"):
        trainer.parallel.forward.register_comm_hook(None, counted)
    measured["status"] = trainer.fit().status
    measured["own"] = (
        sum(p.to_local().numel() for p in trainer.model.parameters()) if trainer.parallel.sharded else None
    )
    measured["all"] = trainer.model.n_params()
    return measured


def main(plan: Path) -> None:
    torch.set_num_threads(1)
    with joined("cpu") as group:
        results = [train(entry, group) for entry in json.loads(plan.read_text())]
        if group.main:
            plan.with_suffix(".result.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
