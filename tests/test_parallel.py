"""Several processes train what one would: the same losses, checkpoints that any number of them goes on from, and a lost one is said."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from parallel_worker import train as train_entry
from tiny_run import TINY, arguments, run, text_file

from fastgpt.data.loader import EvalBatches
from fastgpt.errors import UserError
from fastgpt.model import GPT, GPTConfig, load_model
from fastgpt.train import Trainer, load_config, open_run, start_run
from fastgpt.train.checkpoint import latest_checkpoint, read_state
from fastgpt.train.parallel import Group, explain_loss, joined, lost_peer, shares

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
# Two parts of a step, and an evaluation whose last batch has fewer rows than there are processes.
CHANGES = {"train.grad_accum_steps": "2", "train.eval_tokens": "144", "model.bias": "true"}


def torchrun(*parts: str | Path, processes: int = 2) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    return [*launcher, *map(str, parts)]


def timeless(folder: Path) -> list[list[float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[line[key] for key in ("step", "train_loss", "val_loss", "lr")] for line in lines]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The runs of all comparisons: one process alone, and one job of two processes that does every other run."""
    place = tmp_path_factory.mktemp("parallel")
    overrides = TINY | CHANGES | {"data.source": str(text_file(place))}
    start_run(load_config(overrides=overrides), place / "new", print)
    ddp, fsdp = {"train.parallel": "ddp"}, {"train.parallel": "fsdp"}
    again = {"train.parallel": "fsdp", "train.activation_checkpointing": "true"}
    names = ("alone", "ddp", "fsdp", "one-then-fsdp", "fsdp-then-one", "ddp-then-one", "fsdp-then-ddp", "fsdp-worse")
    for name in names:
        shutil.copytree(place / "new", place / name)

    def entry(name: str, stop: int, options: dict) -> dict:
        return {"folder": str(place / name), "stop": stop, "options": options}

    threads = torch.get_num_threads()
    results = {"alone": [train_entry(entry("alone", 0, ddp), Group())]}
    results["one-then-fsdp"] = [train_entry(entry("one-then-fsdp", 5, ddp), Group())]
    plan = [
        entry("ddp", 0, ddp),
        entry("fsdp", 0, fsdp),
        entry("one-then-fsdp", 0, again),
        entry("fsdp-then-one", 7, fsdp),
        entry("ddp-then-one", 7, ddp),
        entry("fsdp-then-ddp", 3, fsdp),
        entry("fsdp-then-ddp", 0, ddp),
        entry("fsdp-worse", 0, fsdp) | {"best": 0.0},
    ]
    (place / "plan.json").write_text(json.dumps(plan))
    worker = Path(__file__).with_name("parallel_worker.py")
    done = subprocess.run(
        torchrun(worker, place / "plan.json"), capture_output=True, text=True, env=ENVIRONMENT, timeout=110
    )
    assert done.returncode == 0, done.stderr
    for item, result in zip(plan, json.loads((place / "plan.result.json").read_text()), strict=True):
        results.setdefault(Path(item["folder"]).name, []).append(result)
    for name in ("fsdp-then-one", "ddp-then-one"):
        results[name].append(train_entry(entry(name, 0, ddp), Group()))
    torch.set_num_threads(threads)
    return place, results


@pytest.mark.parametrize("name", ["ddp", "fsdp", "one-then-fsdp", "fsdp-then-one", "ddp-then-one", "fsdp-then-ddp"])
def test_the_same_losses_as_one_process(trained, name):
    """Up to the order of sums in float32: every step's loss and gradient norm, every evaluation, the weights at the end."""
    place, results = trained
    for key in ("losses", "norms"):
        expected = results["alone"][0][key]
        assert len(expected) == 12
        assert [value for part in results[name] for value in part[key]] == pytest.approx(expected, rel=2e-5), key
    assert [part["status"] for part in results[name]][-1] == "finished"
    for got, expected in zip(timeless(place / name), timeless(place / "alone"), strict=True):
        assert got == pytest.approx(expected, rel=2e-5)
    ours, theirs = (load_model(place / folder / "model.safetensors").state_dict() for folder in (name, "alone"))
    for key, weight in theirs.items():
        torch.testing.assert_close(ours[key], weight, rtol=1e-3, atol=2e-5)


def test_resumes_go_on_where_the_checkpoint_was(trained):
    _, results = trained
    starts = {name: [part["started_at"] for part in parts] for name, parts in results.items() if len(parts) == 2}
    assert starts == {"one-then-fsdp": [0, 5], "fsdp-then-one": [0, 7], "ddp-then-one": [0, 7], "fsdp-then-ddp": [0, 3]}


def test_fsdp_holds_a_part_of_everything(trained):
    place, results = trained
    measured = results["fsdp"][0]
    assert measured["own"] < 0.6 * measured["all"]
    names = {path.name for path in latest_checkpoint(place / "fsdp").rglob("*") if path.is_file()}
    assert names == {"state.json", "training.safetensors", ".metadata", "__0_0.distcp", "__1_0.distcp"}


def test_a_checkpoint_after_an_evaluation_that_wrote_no_weights(trained):
    """A forward pass without a backward one leaves weights gathered; what is saved then must be the divided ones all the same."""
    place, _ = trained
    assert not (place / "fsdp-worse" / "model.safetensors").exists()
    ours, theirs = (Trainer(open_run(place / name, [], {}), print) for name in ("fsdp-worse", "fsdp"))
    assert ours.state.step == theirs.state.step == 12
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_gradients_are_exchanged_once_a_step(trained):
    """All parameters fit into one of DDP's buckets; an exchange in both parts of a step would make 24."""
    _, results = trained
    assert results["ddp"][0]["exchanges"] == 12


def test_damage_to_a_shard_is_found(trained, tmp_path):
    place, _ = trained
    shutil.copytree(place / "fsdp", tmp_path / "run")
    shard = latest_checkpoint(tmp_path / "run") / "shards" / "__1_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"the content of shards/__1_0.distcp has changed"):
        Trainer(open_run(tmp_path / "run", [], {}), print)
    shard.unlink()
    with pytest.raises(UserError, match=r"shards/__1_0.distcp has 0 bytes"):
        read_state(latest_checkpoint(tmp_path / "run"))


def test_shards_of_another_model_are_refused(trained, tmp_path):
    place, _ = trained
    shutil.copytree(place / "fsdp", tmp_path / "run")
    state = latest_checkpoint(tmp_path / "run") / "state.json"
    state.write_text(state.read_text().replace('"n_head": 2', '"n_head": 1'))
    with pytest.raises(UserError, match="n_head = 1 there, 2 here"):
        Trainer(open_run(tmp_path / "run", [], {}), print)


def test_a_killed_process_ends_the_job_and_the_run_goes_on(tmp_path):
    folder = tmp_path / "run"
    changes = {"train__max_steps": 10**6, "train__eval_interval": 100, "train__checkpoint_interval": 20}
    job = subprocess.Popen(
        torchrun("-m", "fastgpt", *arguments(text_file(tmp_path), folder, **changes)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    try:
        deadline = time.monotonic() + 60
        while latest_checkpoint(folder) is None or latest_checkpoint(folder).name == "step-000000":
            assert time.monotonic() < deadline
            assert job.poll() is None, job.stderr.read()
            time.sleep(0.05)
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        ranks = {
            re.search(rb"\0RANK=(\d)", Path(f"/proc/{child}/environ").read_bytes()).group(1): int(child)
            for child in children
        }
        os.kill(ranks[b"1"], signal.SIGKILL)
        _, said = job.communicate(timeout=60)
    finally:
        job.kill()
    assert job.returncode != 0
    assert "rank 0 of 2 stops: another process of the job has ended" in said
    assert f"torchrun --nproc-per-node=2 -m fastgpt train --resume {folder}" in said
    assert "last good checkpoint: " in said
    step = read_state(latest_checkpoint(folder)).step
    assert step % 20 == 0
    done = run("train", "--resume", folder, "--max-steps", step + 5)
    assert done.returncode == 0, done.stderr
    assert f"resuming from {folder / 'checkpoints' / f'step-{step:06d}'}" in done.stderr


def test_processes_of_a_job_leave_without_the_interpreters_end(tmp_path):
    """At which one of gloo's threads could abort them; seen as a function for the interpreter's end that is not called."""
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, pathlib\n"
        "here = pathlib.Path(__file__).parent\n"
        "(here / f'began-{os.environ.get(\"RANK\")}').touch()\n"
        "atexit.register((here / f'ended-{os.environ.get(\"RANK\")}').touch)\n"
    )
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        torchrun("-m", "fastgpt", *arguments(text_file(tmp_path), tmp_path / "run")),
        capture_output=True,
        text=True,
        env=ENVIRONMENT | {"PYTHONPATH": path},
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert f"run folder: {tmp_path / 'run'}" in done.stdout  # what was said last is not lost
    assert {"began-0", "began-1", "ended-None"} <= {path.name for path in tmp_path.iterdir()}
    assert not [*tmp_path.glob("ended-[01]")]


def test_shares_cover_each_batch_and_are_as_many_for_all():
    batches = EvalBatches(torch.arange(200).numpy(), block_size=8, batch_size=4, n_tokens=72)
    assert [len(x) for x, _ in batches] == [4, 4, 1]
    parts = [list(shares(batches, Group(rank, 3))) for rank in range(3)]
    assert {len(part) for part in parts} == {3}
    assert sum(weight for part in parts for _, _, weight in part) == batches.n_tokens == 72
    rows = [tuple(row.tolist()) for part in parts for x, _, weight in part if weight for row in x]
    assert sorted(rows) == sorted(tuple(row.tolist()) for x, _ in batches for row in x)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_activation_checkpointing_gives_the_same_gradients(dropout):
    """Without dropout a block is one op on the CPU; with it, the second computation must draw the same random numbers."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=13, block_size=8, n_layer=2, n_head=2, n_embd=16, dropout=dropout)).train()
    x = torch.randint(0, 13, (2, 8))
    gradients, calls = [], []
    model.h[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for model.activation_checkpointing in (False, True):
        torch.manual_seed(1)
        model.zero_grad()
        model(x, x)[1].backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert len(calls) == 3  # once plain, twice where the backward pass computes the block again
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_messages_of_a_lost_process():
    assert lost_peer(RuntimeError("[../gloo/transport/tcp/pair.cc:544] Connection closed by peer [127.0.0.1]:4242"))
    assert not lost_peer(RuntimeError("shape '[2]' is invalid for input of size 3"))
    assert not lost_peer(ValueError("connection closed by peer"))
    assert "rank 3 of 4 stops" in str(explain_loss(RuntimeError("a\nb"), Group(3, 4), "runs/x"))


def test_an_environment_that_is_not_torchruns(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="the environment is not torchrun's"), joined():
        pass
