"""The command line: `fastgpt train`, `sample`, `finetune`, `predict`, `tokenizer`, `info`, `bench`.

Every option of a run stands in `fastgpt train --help` with its default, made from the dataclasses of fastgpt.train.config: by
its dotted name (`--train.batch_size 8`) and, for most, by a short one (`--batch-size 8`). torch is imported only by the command
that needs it.

Exit codes: 0 done; 1 the training failed (a loss that is no longer finite); 2 something given cannot be used, told in one line
on stderr; 128 + N ended by signal N (130 after Ctrl-C, with a checkpoint written).
"""

import argparse
import contextlib
import os
import signal
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from fastgpt import __version__
from fastgpt.errors import SaidElsewhere, UserError
from fastgpt.train.config import load_config, nearest, options, preset_names, read_preset, read_yaml, sections

# Short names of options whose own name says too little without its section; None: no short name.
SHORT = {
    "data.source": "--data",
    "tokenizer.type": "--tokenizer",
    "tokenizer.path": "--tokenizer-path",
    "tokenizer.pattern": None,
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors that name the nearest right option."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Like parse_args, with a hint for an unknown option."""
        found, unknown = self.parse_known_intermixed_args(arguments)
        for argument in unknown:
            if argument.startswith("-"):
                name = argument.split("=")[0]
                raise UserError(
                    f"unknown option {name}{nearest(name, self._option_string_actions)} (see {self.prog} --help)"
                )
            raise UserError(f"unexpected argument {argument!r} (see {self.prog} --help)")
        return found


def _parser(command: str, description: str) -> Parser:
    return Parser(
        prog=f"fastgpt {command}".strip(),
        description=description,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=40, width=110),
    )


def _words(default: Any) -> str:
    if default is None:
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, float) else repr(default) if isinstance(default, str) else str(default)


def train_parser() -> Parser:
    """The parser of `fastgpt train`."""
    parser = _parser(
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
        "--dry-run", action="store_true", help="print parameters, memory, operations and time; do nothing"
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
            help=f"{limits['help']} (default: {_words(item.default)})".replace("%", "%%"),
        )
    return parser


def train(arguments: Sequence[str]) -> int:
    """`fastgpt train`."""
    given = vars(train_parser().parse(arguments))
    preset, file, out, resume = (given.pop(name) for name in ("preset", "config", "out", "resume"))
    if resume is not None and out is not None:
        raise UserError("--resume and --out are both given; a resume goes on in its own folder")
    dry_run = given.pop("dry_run")
    if dry_run and resume is not None:
        raise UserError("--dry-run and --resume are both given; a dry run is for a run that is not there yet")
    if resume is None:
        config = load_config(preset=preset, file=file, overrides=given)

    from fastgpt.train.heap import keep_pages
    from fastgpt.train.threads import wait_politely

    keep_pages()  # before torch takes its first memory
    if wait_politely() and os.environ.get("RANK", "0") == "0":  # before torch loads OpenMP
        _say("note: other work is running on these cores, so threads sleep while they wait; a quiet machine is faster")
    from fastgpt.train.run import locked, open_run, start_run

    if dry_run:
        from fastgpt.train.dry_run import dry_run as print_dry_run

        return print_dry_run(config)
    from fastgpt.train.parallel import joined

    device = str(given.get("train.device", "auto" if resume is not None else config.train.device))
    with joined(device) as group:
        if resume is None:

            def prepare() -> Path:
                return start_run(config, Path(out) if out is not None else None, _say).folder

            folder = group.first(prepare)
            run = open_run(folder, [], {})
        else:
            layers = [read_preset(preset)] if preset is not None else []
            layers += [read_yaml(Path(file))] if file is not None else []
            run = open_run(Path(resume), layers, given)

        from fastgpt.train.loop import Trainer

        with locked(run.folder) if group.main else contextlib.nullcontext():
            trainer = Trainer(run, _say, group)
            trainer.say(trainer.description)
            outcome = trainer.fit()
    return _conclude(trainer, outcome) if group.main else outcome.exit_code


def _conclude(trainer: Any, outcome: Any) -> int:
    """What a run came to, and its sample; returns the exit code."""
    if outcome.status == "diverged":
        print(f"fastgpt: error: {outcome.message}", file=sys.stderr)
    elif outcome.message:
        _say(outcome.message)
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
        _stream(
            prompt,
            generate_text(model, tokenizer, prompt, run.config.train.sample_tokens, seed=run.config.train.seed % 2**63),
        )
    return 0


def sample(arguments: Sequence[str]) -> int:
    """`fastgpt sample`."""
    parser = _parser("sample", "Print text from a trained model, as it is made.")
    parser.add_argument("run", metavar="RUN", help="the run folder that `fastgpt train` wrote")
    parser.add_argument(
        "--prompt", metavar="TEXT", default="", help="the text to go on from (default: none, a fresh start)"
    )
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=200, help="tokens to make (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", metavar="X", type=float, default=0.8, help="0 is greedy (default: %(default)s)"
    )
    parser.add_argument(
        "--top-k",
        metavar="N",
        type=int,
        default=50,
        help="draw from the N most probable tokens, 0: all (default: %(default)s)",
    )
    parser.add_argument(
        "--top-p",
        metavar="X",
        type=float,
        default=0.95,
        help="draw from the fewest that reach X (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, help="makes the text repeatable (default: none, other text each time)"
    )
    parser.add_argument("--device", metavar="NAME", default="cpu", help="where to run the model (default: %(default)s)")
    parser.add_argument(
        "--sheet", metavar="FILE", help="write samples at four temperatures into this Markdown file (default: none)"
    )
    given = parser.parse(arguments)
    if given.seed is not None and not 0 <= given.seed < 2**63:
        raise UserError(f"--seed is {given.seed}; accepted is a whole number from 0 to 2**63 - 1")

    from fastgpt.infer import generate_text, load_run
    from fastgpt.train.run import choose_device

    model, tokenizer = load_run(given.run, choose_device(given.device))
    if given.sheet is not None:
        from fastgpt.infer.sheet import write_sheet

        write_sheet(Path(given.sheet), model, tokenizer, given)
        print(f"samples: {given.sheet}")
        return 0
    pieces = generate_text(
        model,
        tokenizer,
        given.prompt,
        given.max_new_tokens,
        temperature=given.temperature,
        top_k=given.top_k or None,
        top_p=given.top_p,
        seed=given.seed,
    )
    _stream(given.prompt, pieces)
    return 0


def finetune(arguments: Sequence[str]) -> int:
    """`fastgpt finetune`."""
    from fastgpt.finetune import command

    parser = _parser(
        "finetune", "Teach a pretrained GPT to answer, to recognise classes of texts, or to give texts a number."
    )
    command.finetune_arguments(parser)
    given = parser.parse(arguments)
    from fastgpt.train.heap import keep_pages
    from fastgpt.train.threads import wait_politely

    keep_pages()  # before torch takes its first memory
    wait_politely()  # before torch loads OpenMP
    return command.finetune(given)


def predict(arguments: Sequence[str]) -> int:
    """`fastgpt predict`."""
    from fastgpt.finetune import command

    parser = _parser("predict", "Print the classes of texts with their probabilities, or their numbers.")
    command.predict_arguments(parser)
    return command.predict(parser.parse(arguments))


def chat(arguments: Sequence[str]) -> int:
    """`fastgpt chat`."""
    from fastgpt.finetune import command

    parser = _parser(
        "chat", "Talk to a model that was fine-tuned on conversations: a question a line, answers as they are made."
    )
    command.chat_arguments(parser)
    return command.chat(parser.parse(arguments))


def info(arguments: Sequence[str]) -> int:
    """`fastgpt info`."""
    parser = _parser(
        "info", "Print versions, the chip, its instruction sets, and which engine each op will use, and why."
    )
    parser.add_argument("--json", action="store_true", help="print JSON (default: text)")
    given = parser.parse(arguments)
    from fastgpt.info import main as run_info

    return run_info(["--json"] if given.json else [])


def bench(arguments: Sequence[str]) -> int:
    """`fastgpt bench`: its options are the benchmarks' own."""
    from fastgpt.benchmarks import main as run_benchmarks

    return run_benchmarks(list(arguments)) or 0


def evaluate(arguments: Sequence[str]) -> int:
    """`fastgpt evaluate`."""
    from fastgpt.infer.command import evaluate as run_evaluate

    return run_evaluate(arguments, _parser)


def data(arguments: Sequence[str]) -> int:
    """`fastgpt data`."""
    from fastgpt.data.command import main as run_data

    return run_data(arguments, _parser, _say)


def tokenizer(arguments: Sequence[str]) -> int:
    """`fastgpt tokenizer`: its commands are in fastgpt.tokenizer.commands."""
    from fastgpt.tokenizer.commands import main as run_tokenizer

    return run_tokenizer(arguments, lambda command, text: _parser(f"tokenizer {command}", text))


COMMANDS = {
    "train": (train, "train a GPT, or go on with a run"),
    "data": (data, "text, JSONL and Parquet into token shards, and their check"),
    "sample": (sample, "print text from a trained model"),
    "evaluate": (evaluate, "loss, perplexity and bits a byte of a text; what a run's losses say"),
    "finetune": (finetune, "teach a trained GPT conversations, classes or numbers"),
    "predict": (predict, "classes or numbers of texts, from a fine-tuned model"),
    "chat": (chat, "talk to a model that was fine-tuned on conversations"),
    "tokenizer": (tokenizer, "train, use and look into a BPE tokenizer"),
    "info": (info, "what this machine has and which engine each op will use"),
    "bench": (bench, "run the benchmarks"),
}


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _stream(prompt: str, pieces: typing.Iterable[str]) -> None:
    """Print the prompt and then the pieces as they come."""
    sys.stdout.write(prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM before the training loop has its own handler: leave through the clean-up code."""
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: those after the program's name; sys.argv's where None.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    lines = "\n".join(f"  {name:11}{text}" for name, (_, text) in COMMANDS.items())
    parser = _parser(
        "", f"Text to a trained GPT to an answer.\n\ncommands:\n{lines}\n\n`fastgpt COMMAND --help` says more."
    )
    parser.usage = "fastgpt COMMAND [options]"
    parser.add_argument("--version", action="version", version=f"fastgpt {__version__}")
    try:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows ? instead of ending the program
        if not arguments:
            parser.print_help()
            return 2
        if arguments[0] not in COMMANDS:
            parser.parse(arguments[:1]) if arguments[0].startswith("-") else None
            raise UserError(
                f"unknown command {arguments[0]!r}{nearest(arguments[0], COMMANDS)}; there are: {', '.join(COMMANDS)}"
            )
        previous = signal.signal(signal.SIGTERM, _terminated)
        try:
            return COMMANDS[arguments[0]][0](arguments[1:])
        finally:
            signal.signal(signal.SIGTERM, previous)
    except SaidElsewhere:
        return 2
    except UserError as error:
        print("fastgpt: error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nfastgpt: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `fastgpt sample RUN | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
