"""`fastgpt finetune`, `predict` and `chat`: arguments to options, a run folder, and what is printed.

RUN/tokenizer.json     the tokenizer
    options.json       what the run was told
    metrics.jsonl      one line for each measurement of the held-out part, and loss.png, their picture
    summary.json       the last of them, and for classes the confusion matrix
    head.safetensors   the weights of a head; of conversations: model.safetensors
        adapter/           with LoRA, peft's two files; base.safetensors is the model it belongs to
    checkpoint.safetensors while it is not finished: where it stands
"""

import argparse
import dataclasses
import json
import shlex
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastgpt.errors import UserError
from fastgpt.finetune.job import (
    Job,
    chat_of,
    head_of,
    make_folder,
    parts,
    remove_unused,
    resumed,
    save_inputs,
    write_training_text,
)
from fastgpt.finetune.options import Options, load_options, preset_names
from fastgpt.finetune.records import read_texts
from fastgpt.terminal import say


def finetune_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fastgpt finetune`."""
    parser.add_argument(
        "run",
        metavar="RUN_OR_PRETRAINED",
        nargs="?",
        help="the model to go on from: a run folder, a Hugging Face folder, a .gguf file, or hf:OWNER/NAME of its hub",
    )
    parser.add_argument(
        "--data", metavar="FILE", help="labelled texts (TSV, CSV, JSONL) or conversations (JSON, JSONL); must be given"
    )
    parser.add_argument("--preset", metavar="NAME", help=f"ready options: {', '.join(preset_names())} (default: none)")
    parser.add_argument(
        "--out", metavar="FOLDER", help="the run folder to make (default: runs/<data>-N, the next free N)"
    )
    parser.add_argument(
        "--resume", metavar="FOLDER", help="go on with a fine-tuning that was stopped (default: start a new one)"
    )
    parser.add_argument(
        "--write-text",
        metavar="FILE",
        help="write the texts of the training part to FILE, for `fastgpt train --data FILE`, and train nothing",
    )
    hints = typing.get_type_hints(Options)
    for item in dataclasses.fields(Options):
        kinds: dict[Any, str] = {bool: "true|false", int: "N", float: "X", str: "TEXT"}
        metavar = kinds[(typing.get_args(hints[item.name]) or (hints[item.name],))[0]]
        default = (
            "none" if item.default is None else f"{item.default:g}" if isinstance(item.default, float) else item.default
        )
        parser.add_argument(
            f"--{item.name.replace('_', '-')}",
            dest=item.name,
            metavar="|".join(item.metadata.get("choices", ())) or metavar,
            default=argparse.SUPPRESS,
            help=f"{item.metadata['help']} (default: {default})",
        )


def _write_text(data: Path, path: Path, options: Options) -> int:
    train, held_out, _ = parts(options, data)
    write_training_text(train, path)
    say(f"{path}: {len(train):,} texts of the training part; the {len(held_out):,} held out are not in it")
    return 0


def finetune(given: argparse.Namespace) -> int:
    """`fastgpt finetune`, its arguments parsed."""
    from fastgpt.finetune.loop import Stopped
    from fastgpt.train.run import locked

    values = dict(vars(given))
    run, data, preset, out, resume, write_text = (
        values.pop(name) for name in ("run", "data", "preset", "out", "resume", "write_text")
    )
    if resume is not None:
        job = resumed(Path(resume), values, [name for name in (run, preset, out, write_text) if name is not None], data)
    else:
        if data is None:
            raise UserError("which data? Give --data FILE: labelled texts or conversations")
        options = load_options(preset, values)
        if options.task == "chat" and write_text is not None:
            raise UserError("--write-text is for labelled texts: --task classify or regress")
        if options.task != "chat" and options.lora_rank:
            raise UserError("--lora-rank is for --task chat; a head is trained with all weights")
        if write_text is not None:
            return _write_text(Path(data), Path(write_text), options)
        if run is None:
            raise UserError("which model? Give a run folder or a pretrained one: fastgpt finetune RUN --data FILE")
        job = Job(run, Path(data), options)
    train = chat_of(job) if job.options.task == "chat" else head_of(job)
    folder = Path(resume) if resume is not None else make_folder(out, job.data)
    with locked(folder):
        save_inputs(folder, job)
        try:
            print("\n".join(train(folder)))
        except Stopped as stop:
            say(f"{stop}. To go on: fastgpt finetune --resume {shlex.quote(str(folder))}")
            return 128 + stop.number
        except BaseException:
            if resume is None:
                remove_unused(folder)
            raise
    print(f"run folder: {folder}", flush=True)
    return 0


def predict_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fastgpt predict`."""
    parser.add_argument("run", metavar="RUN", help="the run folder of `fastgpt finetune --task classify` or regress")
    parser.add_argument(
        "input", metavar="FILE_OR_TEXT", help="a TSV, CSV, JSONL or .txt file of texts, or a text itself"
    )
    parser.add_argument(
        "--format", choices=("table", "json"), default="table", help="how to print (default: %(default)s)"
    )
    parser.add_argument("--text-column", metavar="NAME", help="the texts' column of a file, by name or number from 1")
    parser.add_argument("--encoding", metavar="NAME", help="the file's encoding (default: UTF-8)")
    parser.add_argument("--device", metavar="NAME", default="cpu", help="where to run the model (default: %(default)s)")


def predict(given: argparse.Namespace, write: Callable[[str], object] = print) -> int:
    """`fastgpt predict`: a table, or a JSON object a line."""
    from fastgpt.finetune.classify import Predictor
    from fastgpt.train.run import choose_device

    predictor = Predictor(Path(given.run), choose_device(given.device))
    path = Path(given.input)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # a text too long for a file's name, or with a NUL
        is_file = False
    if is_file:
        texts = read_texts(path, text_column=given.text_column, encoding=given.encoding)
    elif given.text_column or given.encoding:
        raise UserError(f"no such file: {given.input}; --text-column and --encoding are for files")
    else:
        texts = [given.input]
    found = predictor(texts)
    if given.format == "json":
        for text, result in zip(texts, found, strict=True):
            write(json.dumps({"text": text, **result}, ensure_ascii=False))
        return 0
    labels = predictor.meaning.labels
    width = max([10, *(len(label) for label in labels)])
    names = ("label", *(f"p({label})" for label in labels)) if labels else ("value",)
    width = max(width, *map(len, names))
    write("  ".join([f"{name:<{width}}" for name in names] + ["text"]))
    for text, result in zip(texts, found, strict=True):
        cells = (
            [f"{result['label']:<{width}}", *(f"{p:<{width}.4f}" for p in result["probabilities"].values())]
            if labels
            else [f"{result['value']:<{width}.4f}"]
        )
        words = " ".join(text.split())
        write("  ".join([*cells, words if len(words) <= 60 else words[:57] + "..."]))
    return 0


def chat_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fastgpt chat`."""
    parser.add_argument("run", metavar="RUN", help="the run folder of `fastgpt finetune` on conversations")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first (default: nothing)")
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=256, help="longest answer (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", metavar="X", type=float, default=0.7, help="0 is greedy (default: %(default)s)"
    )
    parser.add_argument("--top-k", metavar="N", type=int, default=50, help="0: all tokens (default: %(default)s)")
    parser.add_argument(
        "--top-p",
        metavar="X",
        type=float,
        default=0.95,
        help="draw from the fewest that reach X (default: %(default)s)",
    )
    parser.add_argument("--seed", metavar="N", type=int, help="makes the answers repeatable (default: none)")
    parser.add_argument("--device", metavar="NAME", default="cpu", help="where to run the model (default: %(default)s)")


def chat(given: argparse.Namespace) -> int:
    """`fastgpt chat`: one question a line of stdin, answers as they are made; /reset forgets, /exit and the end of input leave."""
    if given.seed is not None and not 0 <= given.seed < 2**62:
        raise UserError(f"--seed is {given.seed}; accepted is a whole number from 0 to 2**62 - 1")

    from fastgpt.finetune.chat import Chat
    from fastgpt.infer import load_run
    from fastgpt.tokenizer import Tokenizer
    from fastgpt.train.run import choose_device

    model, tokenizer = load_run(given.run, choose_device(given.device))
    if not isinstance(tokenizer, Tokenizer):
        raise UserError(
            f"{given.run}: has a character tokenizer; accepted is a run of fastgpt finetune on conversations"
        )
    talk = Chat(
        model,
        tokenizer,
        system=given.system,
        max_new_tokens=given.max_new_tokens,
        temperature=given.temperature,
        top_k=given.top_k or None,
        top_p=given.top_p,
        seed=given.seed,
    )
    asks = sys.stdin.isatty()
    if asks:
        say("/reset forgets the conversation, /exit leaves")
    while True:
        if asks:
            sys.stdout.write("> ")
            sys.stdout.flush()
        line = sys.stdin.readline()
        question = line.strip()
        if not line or question in ("/exit", "/quit"):
            return 0
        if question == "/reset":
            talk.reset()
        elif question:
            for piece in talk.ask(question):
                sys.stdout.write(piece)
                sys.stdout.flush()
            sys.stdout.write("\n")
            sys.stdout.flush()
