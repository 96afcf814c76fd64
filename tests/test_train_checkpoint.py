"""Checkpoints: a kill at any write leaves a good one; damage is found and named; what is saved loads again the same."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgpt.errors import UserError
from fastgpt.model import GPT, GPTConfig
from fastgpt.train.checkpoint import TrainState, latest_checkpoint, load_checkpoint, read_state, save_checkpoint
from fastgpt.train.files import check_space, explain_writing, replace_file, replace_text
from fastgpt.train.optimizer import AdamW, build_optimizer

CONFIG = GPTConfig(vocab_size=11, block_size=4, n_layer=1, n_head=1, n_embd=8)


def pair(seed: int = 0, config: GPTConfig = CONFIG) -> tuple[GPT, AdamW]:
    torch.manual_seed(seed)
    model = GPT(config)
    return model, build_optimizer(model, learning_rate=0.1, weight_decay=0.1, betas=(0.9, 0.99))


def trained(steps: int = 3) -> tuple[GPT, AdamW]:
    model, optimizer = pair()
    x = torch.randint(0, 11, (2, 4))
    for _ in range(steps):
        model(x, x)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_what_is_saved_loads_again(tmp_path):
    model, optimizer = trained()
    state = TrainState(
        step=3, max_steps=9, eval_interval=2, best_loss=0.1 + 0.2, best_step=2, elapsed_s=1 / 3, threads=2
    )
    folder = save_checkpoint(tmp_path, model, optimizer, state)
    drawn = torch.rand(5)
    other, other_optimizer = pair(seed=5)
    assert load_checkpoint(folder, other, other_optimizer) == state
    assert torch.equal(torch.rand(5), drawn)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        for key, value in optimizer.state[a].items():
            assert torch.equal(value, other_optimizer.state[b][key]), key
    x = torch.ones(1, 4, dtype=torch.int64)
    for one, opt in ((model, optimizer), (other, other_optimizer)):  # and the next step is the same one
        one(x, x)[1].backward()
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_last_two_are_kept_also_past_a_million_steps(tmp_path):
    model, optimizer = trained()
    for step in (0, 5, 999_999, 1_000_000):
        save_checkpoint(tmp_path, model, optimizer, TrainState(step=step))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step-1000000", "step-999999"]
    assert latest_checkpoint(tmp_path).name == "step-1000000"


def test_checkpoints_of_a_later_attempt_go_away(tmp_path):
    model, optimizer = trained()
    for step in (4, 8, 6):
        save_checkpoint(tmp_path, model, optimizer, TrainState(step=step))
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == ["step-000004", "step-000006"]


def test_without_a_pointer_the_newest_is_taken(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    model, optimizer = trained()
    for step in (4, 8):
        save_checkpoint(tmp_path, model, optimizer, TrainState(step=step))
    (tmp_path / "checkpoints" / "latest").write_text("step-000004\n")
    assert latest_checkpoint(tmp_path).name == "step-000004"
    for text in ("step-000099\n", "../../etc\n", ""):
        (tmp_path / "checkpoints" / "latest").write_text(text)
        assert latest_checkpoint(tmp_path).name == "step-000008"


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x40
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "missing", "flip"])
def test_damage_is_found_and_the_way_out_named(tmp_path, name, damage):
    model, optimizer = trained()
    save_checkpoint(tmp_path, model, optimizer, TrainState(step=1))
    folder = save_checkpoint(tmp_path, model, optimizer, TrainState(step=2))
    path = folder / name
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "missing":
        path.unlink()
    elif name == "state.json":
        path.write_text(path.read_text().replace('"crc32": ', '"crc32": 1'))
    else:
        flip_a_byte(path)
    other, other_optimizer = pair(seed=5)
    before = [parameter.clone() for parameter in other.parameters()]
    with pytest.raises(UserError) as caught:
        load_checkpoint(folder, other, other_optimizer)
    message = str(caught.value)
    assert "damaged" in message
    assert str(folder) in message
    assert "remove that folder to go on from step-000001" in message
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"format": "other"}', '{"format": "fastgpt-checkpoint", "version": 2}']
)
def test_a_foreign_folder_is_refused(tmp_path, content):
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(UserError, match=r"is not a checkpoint of fastgpt|another version"):
        read_state(tmp_path)


def test_another_model_is_refused(tmp_path):
    model, optimizer = trained()
    folder = save_checkpoint(tmp_path, model, optimizer, TrainState(step=1))
    other = pair(config=GPTConfig(vocab_size=11, block_size=4, n_layer=2, n_head=1, n_embd=8))
    with pytest.raises(UserError, match="n_layer"):
        load_checkpoint(folder, *other)


def test_moments_must_be_there(tmp_path):
    model, optimizer = trained()
    folder = save_checkpoint(tmp_path, model, optimizer, TrainState(step=3))
    path = folder / "training.safetensors"
    save_file({key: value for key, value in load_file(path).items() if key != "exp_avg.wpe.weight"}, path)
    state = json.loads((folder / "state.json").read_text())
    import zlib

    state["files"][path.name] = {"bytes": path.stat().st_size, "crc32": zlib.crc32(path.read_bytes())}
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"no exp_avg for wpe\.weight"):
        load_checkpoint(folder, *pair())


# Forks once for every call that touches the disk while a second checkpoint is written, and kills the child with SIGKILL at that
# call. Prints, for each, the number of the call, the child's exit, and the step that a resume would load.
KILLER = """
import os, shutil, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from fastgpt.train import checkpoint, files
from fastgpt.train.checkpoint import TrainState, latest_checkpoint, read_state, save_checkpoint
sys.path.insert(0, {tests!r})
from test_train_checkpoint import trained

model, optimizer = trained()
run = Path(sys.argv[1])
again = sys.argv[2] == "again"
call = 0
while True:
    call += 1
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    for step in (1, 2, 3):
        save_checkpoint(run, model, optimizer, TrainState(step=step))
    if again:
        (run / "checkpoints" / "latest").write_text("step-000002\\n")
    child = os.fork()
    if child == 0:
        left = call
        def counted(function):
            def wrapper(*args, **kwargs):
                global left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)
            return wrapper
        for name in ("open", "fsync", "rename", "replace", "mkdir", "rmdir", "unlink", "chmod"):
            setattr(os, name, counted(getattr(os, name)))
        save_checkpoint(run, model, optimizer, TrainState(step=3 if again else 4))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(call, status, read_state(latest_checkpoint(run)).step, flush=True)
    if status == 0:
        break
    # and the next attempt gets through and leaves no rubbish
    save_checkpoint(run, model, optimizer, TrainState(step=3 if again else 4))
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == (["latest", "step-000002", "step-000003"] if again else ["latest", "step-000003", "step-000004"]), names
"""


@pytest.mark.parametrize("case", ["next", "again"])
def test_a_kill_at_any_write_leaves_a_good_checkpoint(tmp_path, case):
    """`next` writes step 4 after 2 and 3; `again` writes step 3 once more, over one left by an earlier attempt."""
    script = KILLER.format(tests=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run"), case],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    rows = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    killed, last = rows[:-1], rows[-1]
    assert len(killed) >= 10
    assert {status for _, status, _ in killed} == {signal.SIGKILL}
    good = {2, 3} if case == "again" else {3, 4}
    assert {step for _, _, step in killed} == good
    assert last[1:] == (0, max(good))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    replace_text(path, "old")

    def broken(temporary: Path) -> None:
        temporary.write_text("half")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        replace_file(path, broken)
    assert [item.name for item in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"


@pytest.mark.parametrize("number", [28, 122, 27])
def test_a_full_disk_is_one_line(tmp_path, number):
    with pytest.raises(UserError, match="no disk space left; do this"), explain_writing(tmp_path, "do this"):
        raise OSError(number, os.strerror(number))


def test_other_errors_pass_through(tmp_path):
    with pytest.raises(ZeroDivisionError), explain_writing(tmp_path):
        raise ZeroDivisionError
    with pytest.raises(UserError, match="Permission denied"), explain_writing(tmp_path):
        raise PermissionError(13, "Permission denied")


def test_check_space(tmp_path):
    check_space(tmp_path / "not" / "there", 1, "x")
    with pytest.raises(UserError, match=r"no disk space for the run: about .* MB needed, .* MB free"):
        check_space(tmp_path / "not" / "there", 10**18, "the run")
