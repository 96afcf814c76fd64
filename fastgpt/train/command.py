"""`fastgpt train`: its options, a new run or one to be gone on with, and what is printed at the end.

Every option stands in `fastgpt train --help` with its default, made from the dataclasses of fastgpt.train.config: by its dotted name
(`--train.batch_size 8`) and, for most, by a short one (`--batch-size 8`).
"""

import argparse
import contextlib
import os
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgpt.errors import UserError
from fastgpt.terminal import Parser, command_parser, default_words, import_torch, say, stream
from fastgpt.train.config import load_config, options, preset_names, read_preset, read_yaml, sections

if TYPE_CHECKING:
    from fastgpt.train.loop import Outcome, Trainer

# Short names of options whose own name says too little without its section; None: no short name.
SHORT = {
    "data.source": "--data",
    "tokenizer.type": "--tokenizer",
    "tokenizer.path": "--tokenizer-path",
    "tokenizer.pattern": None,
}


def train_parser() -> Parser:
    """The parser of `fastgpt train`."""
    parser = command_parser(
        "train",
        "Train a GPT. With nothing given: the standard library's source, a BPE tokenizer, about three minutes on two cores.\n"
        "Values come from the defaults, --preset, --config, and the options below, each over the one before.",
    )
    parser.add_argument(
        "--preset", metavar="NAME", help=f"a ready configuration: {', '.join(preset_names())} (default: none)"
    )
    parser.add_argument(
        "--config", metavar="FILE", help="a YAML file with sections data, tokenizer, model, train (default: none)"
    )
    parser.add_argument(
        "--out", metavar="RUN", help="the run folder to make (default: runs/<corpus>-N, the next free N)"
    )
    parser.add_argument("--resume", metavar="RUN", help="go on with a run that was stopped (default: start a new one)")
    parser.add_argument(
        "--dry-run",
        metavar="PROCESSES",
        nargs="?",
        type=int,
        const=0,
        help="print parameters, memory, operations and time, of each of so many processes, and do nothing "
        "(default: no; without a number those of torchrun, or one)",
    )
    groups = {name: parser.add_argument_group(name) for name in sections()}
    for key, item in options():
        section, name = key.split(".")
        short = SHORT.get(key, f"--{name.replace('_', '-')}")
        limits = item.metadata
        kinds: dict[Any, str] = {bool: "true|false", int: "N", float: "X", str: "TEXT"}
        metavar = kinds[(typing.get_args(item.type) or (item.type,))[0]]
        if "choices" in limits:
            metavar = "|".join(limits["choices"])
        groups[section].add_argument(
            *([short] if short else []),
            f"--{key}",
            dest=key,
            metavar=metavar,
            default=argparse.SUPPRESS,
            help=f"{limits['help']} (default: {default_words(item.default)})".replace("%", "%%"),
        )
    return parser


def train(arguments: Sequence[str]) -> int:
    """`fastgpt train`."""
    given = vars(train_parser().parse(arguments))
    preset, file, out, resume = (given.pop(name) for name in ("preset", "config", "out", "resume"))
    if resume is not None and out is not None:
        raise UserError("--resume and --out are both given; a resume goes on in its own folder")
    dry_run = given.pop("dry_run")
    if dry_run is not None and dry_run < 0:
        raise UserError(f"--dry-run is {dry_run}; accepted is a number of processes from 1")
    if dry_run is not None and resume is not None:
        raise UserError("--dry-run and --resume are both given; a dry run is for a run that is not there yet")
    if resume is None:
        config = load_config(preset=preset, file=file, overrides=given)

    from fastgpt.train.heap import keep_pages
    from fastgpt.train.threads import wait_politely

    keep_pages()  # before torch takes its first memory
    if wait_politely() and os.environ.get("RANK", "0") == "0":  # before torch loads OpenMP
        say("note: other work is running on these cores, so threads sleep while they wait; a quiet machine is faster")
    import_torch()
    from fastgpt.train.parallel import job_size, joined, leave
    from fastgpt.train.run import locked, open_run, start_run

    if dry_run is not None:
        from fastgpt.train.dry_run import dry_run as print_dry_run

        world_size, rank, _ = job_size()
        return print_dry_run(config, dry_run or world_size) if rank == 0 else 0

    device = str(given.get("train.device", "auto" if resume is not None else config.train.device))
    with joined(device) as group:
        if resume is None:

            def prepare() -> Path:
                return start_run(config, Path(out) if out is not None else None, say).folder

            folder = group.first(prepare)
            run = open_run(folder, [], {})
        else:
            layers = [read_preset(preset)] if preset is not None else []
            layers += [read_yaml(Path(file))] if file is not None else []
            run = open_run(Path(resume), layers, given)

        from fastgpt.train.loop import Trainer

        with locked(run.folder) if group.main else contextlib.nullcontext():
            trainer = Trainer(run, say, group)
            trainer.say(trainer.description)
            outcome = trainer.fit()
    code = _conclude(trainer, outcome) if group.main else outcome.exit_code
    if group.world_size > 1:
        leave(code)
    return code


def _conclude(trainer: "Trainer", outcome: "Outcome") -> int:
    """What a run came to, and its sample; returns the exit code."""
    if outcome.status == "diverged":
        print(f"fastgpt: error: {outcome.message}", file=sys.stderr)
    elif outcome.message:
        say(outcome.message)
    if outcome.exit_code:
        return outcome.exit_code
    run = trainer.run
    summary = trainer.finish()
    print(
        f"validation loss {summary['val_loss']:.4f} ({summary['val_bits_per_byte']:.3f} bits per byte), "
        f"bigram baseline {summary['bigram_val_loss']:.4f} ({summary['bigram_val_bits_per_byte']:.3f}), "
        f"on the same {summary['val_tokens']:,} held-out tokens"
    )
    print(f"run folder: {run.folder}", flush=True)
    if run.config.train.sample_tokens:
        from fastgpt.infer import generate_text, load_run

        prompt = run.config.train.sample_prompt
        model, tokenizer = load_run(run.folder)
        print("sample:")
        stream(
            prompt,
            generate_text(model, tokenizer, prompt, run.config.train.sample_tokens, seed=run.config.train.seed % 2**63),
        )
    return 0
