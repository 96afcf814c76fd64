"""The command line: one function a command, each of which loads what it needs when it is called.

torch is imported only by the commands that need it, so that `--help` is fast.

Exit codes: 0 done; 1 the training failed (a loss that is no longer finite); 2 something given cannot be used, told in one line
on stderr; 128 + N ended by signal N (130 after Ctrl-C, with a checkpoint written).
"""

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from fastgpt import __version__
from fastgpt.errors import SaidElsewhere, UserError
from fastgpt.terminal import command_parser, import_torch
from fastgpt.train.config import nearest


def train(arguments: Sequence[str]) -> int:
    """`fastgpt train`."""
    from fastgpt.train.command import train as run_train

    return run_train(arguments)


def sample(arguments: Sequence[str]) -> int:
    """`fastgpt sample`."""
    from fastgpt.infer.command import sample as run_sample

    return run_sample(arguments)


def evaluate(arguments: Sequence[str]) -> int:
    """`fastgpt evaluate`."""
    from fastgpt.infer.command import evaluate as run_evaluate

    return run_evaluate(arguments)


def data(arguments: Sequence[str]) -> int:
    """`fastgpt data`."""
    from fastgpt.data.command import main as run_data

    return run_data(arguments)


def finetune(arguments: Sequence[str]) -> int:
    """`fastgpt finetune`."""
    from fastgpt.finetune import command

    parser = command_parser(
        "finetune", "Teach a pretrained GPT to answer, to recognise classes of texts, or to give texts a number."
    )
    command.finetune_arguments(parser)
    given = parser.parse(arguments)
    from fastgpt.train.heap import keep_pages
    from fastgpt.train.threads import wait_politely

    keep_pages()  # before torch takes its first memory
    wait_politely()  # before torch loads OpenMP
    import_torch()
    return command.finetune(given)


def predict(arguments: Sequence[str]) -> int:
    """`fastgpt predict`."""
    from fastgpt.finetune import command

    parser = command_parser("predict", "Print the classes of texts with their probabilities, or their numbers.")
    command.predict_arguments(parser)
    given = parser.parse(arguments)
    import_torch()
    return command.predict(given)


def chat(arguments: Sequence[str]) -> int:
    """`fastgpt chat`."""
    from fastgpt.finetune import command

    parser = command_parser(
        "chat", "Talk to a model that was fine-tuned on conversations: a question a line, answers as they are made."
    )
    command.chat_arguments(parser)
    given = parser.parse(arguments)
    import_torch()
    return command.chat(given)


def info(arguments: Sequence[str]) -> int:
    """`fastgpt info`."""
    parser = command_parser(
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


def tokenizer(arguments: Sequence[str]) -> int:
    """`fastgpt tokenizer`: its commands are in fastgpt.tokenizer.commands."""
    from fastgpt.tokenizer.commands import main as run_tokenizer

    return run_tokenizer(arguments, lambda command, text: command_parser(f"tokenizer {command}", text))


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
    parser = command_parser(
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
        # A shell has the jobs that a script starts with & ignore SIGINT; whoever sends it to one wants it to stop.
        handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _terminated}
        previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            return COMMANDS[arguments[0]][0](arguments[1:])
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
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
