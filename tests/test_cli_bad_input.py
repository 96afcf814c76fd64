"""Everything wrong that a user can give ends with one line on stderr, exit code 2, and nothing half-written."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import arguments, command, run, text_file

from fastgpt.cli import main


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with the content of the files."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture
def refuses(tmp_path, capsys):
    """Calls the command line; checks exit code 2, one line of error, and that tmp_path is as it was. Returns the line."""

    def call(*parts: object) -> str:
        before = tree(tmp_path)
        capsys.readouterr()
        code = main([str(part) for part in parts])
        shown = capsys.readouterr()
        errors = [line for line in shown.err.splitlines() if line.startswith("fastgpt: error: ")]
        assert code == 2, shown.err
        assert len(errors) == 1
        assert shown.err.splitlines()[-1] == errors[0]
        assert "Traceback" not in shown.err
        assert tree(tmp_path) == before
        return errors[0]

    return call


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    assert main(arguments(text_file(folder), folder / "run")) == 0
    return folder / "run"


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """A finished run of one's own."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"x", "too short"),
        (b"abc\n" * 20, "bytes, too few for model.block_size 16"),
        (b"\x7fELF\0\0\0" * 300, "is binary"),
        (b"caf\xe9\n" * 300, "is not UTF-8"),
    ],
)
def test_bad_text(tmp_path, refuses, content, words):
    data = tmp_path / "bad.txt"
    if content is not None:
        data.write_bytes(content)
    line = refuses(*arguments(data, tmp_path / "deep" / "run"))
    assert words in line
    assert "bad.txt" in line


def test_an_empty_folder(tmp_path, refuses):
    (tmp_path / "empty").mkdir()
    assert "holds no UTF-8 text" in refuses(*arguments(tmp_path / "empty", tmp_path / "run"))


def test_a_block_size_larger_than_the_text(tmp_path, refuses):
    line = refuses(*arguments(text_file(tmp_path), tmp_path / "run", model__block_size=100_000))
    assert "too few for model.block_size 100000" in line


def test_a_block_size_that_only_the_tokens_show_to_be_too_large(tmp_path, refuses):
    """Enough bytes, too few tokens: known only after the tokenizer, when the folder is half made."""
    data = tmp_path / "text.txt"
    data.write_text("the same words again " * 100)
    line = refuses(
        *arguments(
            data, tmp_path / "new" / "run", tokenizer__type="bpe", tokenizer__vocab_size=300, model__block_size=150
        )
    )
    assert "tokens, too few for model.block_size 150" in line


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (["train", "--max-step", "3"], "unknown option --max-step; did you mean '--max-steps'?"),
        (
            ["train", "--train.lerning_rate=1"],
            "unknown option --train.lerning_rate; did you mean '--train.learning_rate'?",
        ),
        (["train", "--data.val_fracton", "0.1"], "did you mean '--data.val_fraction'?"),
        (["train", "file.txt"], "unexpected argument 'file.txt'"),
        (["train", "--max-steps", "x"], "train.max_steps is 'x'"),
        (["train", "--max-steps"], "expected one argument"),
        (["train", "--max-steps", "5", "--epochs", "1"], "both given"),
        (["train", "--preset", "shakespear-char-cpu"], "did you mean 'shakespeare-char-cpu'?"),
        (["train", "--config", "no-such.yaml"], "no-such.yaml"),
        (["train", "--device", "tpu"], "train.device is 'tpu'"),
        (["train", "--device", "cuda:99"], "train.device is 'cuda:99'"),
        (["train", "--activation", "gello"], "did you mean 'gelu'?"),
        (["train", "--init", "kaiming"], "model.init"),
        (["train", "--n-head", "5"], "model.n_head"),
        (["train", "--resume", "a", "--out", "b"], "both given"),
        (["train", "--resume", "no-such-run"], "no such folder"),
        (["sample", "no-such-run"], "no such folder"),
        (["sample"], "RUN"),
        (["sample", "run", "--top-k", "many"], "--top-k"),
        (["sample", "run", "--seed", "-1"], "--seed is -1"),
        (["sampel"], "did you mean 'sample'?"),
        (["--verson"], "unknown option --verson; did you mean '--version'?"),
        (["info", "--all"], "unknown option --all"),
    ],
)
def test_bad_arguments(refuses, parts, words):
    assert words in refuses(*parts)


def test_a_run_folder_that_holds_a_run(copy, refuses, tmp_path):
    line = refuses(*arguments(text_file(copy.parent), copy))
    assert f"already holds a run; go on with --resume {copy}" in line


def test_a_folder_with_other_files_or_a_file_in_its_place(tmp_path, refuses):
    data = text_file(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    assert "is not empty" in refuses(*arguments(data, tmp_path / "photos"))
    assert "is a file" in refuses(*arguments(data, data))


def test_an_empty_folder_is_fine_as_a_run_folder(tmp_path):
    (tmp_path / "run").mkdir()
    assert main(arguments(text_file(tmp_path), tmp_path / "run", train__max_steps=1)) == 0


def test_a_run_that_another_process_trains(copy, refuses):
    code = (
        "import sys; from pathlib import Path; from fastgpt.train.run import locked\n"
        "with locked(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", code, copy], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    assert "another process is training" in refuses("train", "--resume", copy, "--max-steps", "20")
    other.kill()
    other.communicate()
    assert main(["train", "--resume", str(copy)]) == 0


def test_a_folder_that_is_no_run(tmp_path, refuses):
    (tmp_path / "photos").mkdir()
    assert "has no config.yaml" in refuses("train", "--resume", tmp_path / "photos")
    assert "not a run folder" in refuses("sample", tmp_path / "photos")


def test_a_config_for_another_model(copy, tmp_path, refuses):
    (tmp_path / "other.yaml").write_text("model:\n  n_layer: 6\n")
    line = refuses("train", "--resume", copy, "--config", tmp_path / "other.yaml")
    assert "model.n_layer is 6, but the run" in line
    assert "was started with 2" in line


def test_a_config_edited_to_another_model(copy, refuses):
    path = copy / "config.yaml"
    path.write_text(path.read_text().replace("n_embd: 16", "n_embd: 32"))
    assert "n_embd" in refuses("train", "--resume", copy, "--max-steps", "20", "--train.patience", "0")


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "state.json"])
def test_a_truncated_checkpoint(copy, refuses, name):
    path = copy / "checkpoints" / "step-000012" / name
    path.write_bytes(path.read_bytes()[:-5])
    line = refuses("train", "--resume", copy)
    assert "is damaged" in line
    assert "remove that folder to go on from step-000008" in line
    shutil.rmtree(path.parent)
    assert main(["train", "--resume", str(copy)]) == 0


def test_a_foreign_checkpoint(copy, refuses):
    (copy / "checkpoints" / "step-000012" / "state.json").write_text('{"epoch": 3, "model": "resnet"}')
    assert "is not a checkpoint of fastgpt" in refuses("train", "--resume", copy)


@pytest.mark.parametrize("name", ["config.yaml", "tokenizer.json", "data/train.bin", "data/meta.json"])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_run(copy, refuses, name, damage):
    path = copy / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 - 1])
    if name == "config.yaml" and damage == "cut":
        path.write_text("model: {")
    assert path.name in refuses("train", "--resume", copy)


def test_truncated_weights_for_a_sample(copy, refuses):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    assert "model.safetensors" in refuses("sample", copy)


def test_a_prompt_with_unknown_characters(finished, refuses):
    assert "prompt" in refuses("sample", finished, "--prompt", "ж")


def test_sampling_settings_out_of_range(finished, refuses):
    for option, value in (("--temperature", "-1"), ("--top-p", "0"), ("--top-k", "-3"), ("--max-new-tokens", "-1")):
        assert "accepted" in refuses("sample", finished, option, value)


def test_no_disk_space_is_known_before_anything_is_written(tmp_path, refuses, monkeypatch):
    data = text_file(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    line = refuses(*arguments(data, tmp_path / "run"))
    assert "no disk space for the run" in line
    assert "1 MB free" in line


def limited(limit_bytes: int):
    """Runs in the child before the program: no file can grow beyond the limit, as on a disk that fills up."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    return limit


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE")
def test_a_disk_that_fills_up_while_the_run_is_prepared_leaves_nothing(tmp_path):
    data = text_file(tmp_path, n_lines=4000)
    before = tree(tmp_path)
    done = run(*arguments(data, tmp_path / "new" / "run"), preexec_fn=limited(20_000))
    assert done.returncode == 2, done.stderr
    assert "no disk space left" in done.stderr.splitlines()[-1]
    assert tree(tmp_path) == before


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE")
def test_a_disk_that_fills_up_later_keeps_the_last_good_checkpoint(tmp_path):
    """The weights fit below the limit, the optimizer's moments do not; so neither does the first checkpoint of a resume."""
    data = text_file(tmp_path)
    out = tmp_path / "run"
    assert main(arguments(data, out, train__max_steps=4)) == 0
    limit = (out / "checkpoints" / "step-000004" / "training.safetensors").stat().st_size - 100
    done = run("train", "--resume", out, "--max-steps", "12", preexec_fn=limited(limit))
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert "no disk space left" in last
    assert f"last good checkpoint: {out}/checkpoints/step-000004" in last
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["latest", "step-000000", "step-000004"]
    assert main(["train", "--resume", str(out)]) == 0


@pytest.mark.parametrize("ignored", [False, True], ids=["of a terminal", "of a background job"])
def test_ctrl_c_while_the_run_is_prepared_leaves_nothing(tmp_path, ignored):
    """Interrupted while a large text is being tokenized; also where the process began with it ignored, as after a script's `&`."""
    data = tmp_path / "big.txt"
    data.write_text("some words that come again and again, and some that do not\n" * 1_000_000)
    before = set(tree(tmp_path))
    disposition = signal.SIG_IGN if ignored else signal.SIG_DFL
    process = subprocess.Popen(
        command(*arguments(data, tmp_path / "new" / "run", tokenizer__type="bpe")),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, disposition),
    )
    end = time.monotonic() + 60
    while set(tree(tmp_path)) == before:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted" in errors.splitlines()[-1]
    assert set(tree(tmp_path)) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_torch_is_loaded_waits_for_the_end_of_it(number):
    """Raised inside the imports, an exception would meet C++ that ends the process (SIGABRT)."""
    code = (
        "import builtins, os, signal, sys; from fastgpt.cli import main; load = builtins.__import__\n"
        "def load_and_stop(name, *rest):\n"
        f"    if name == 'torch._C': builtins.__import__ = load; os.kill(os.getpid(), {int(number)})\n"
        "    return load(name, *rest)\n"
        "builtins.__import__ = load_and_stop\n"
        "try: code = main(['sample', 'nothing'])\n"
        "except SystemExit as stop: code = stop.code\n"
        "sys.exit(code if 'torch' in sys.modules else 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + number, done.stderr
    assert "Traceback" not in done.stderr
