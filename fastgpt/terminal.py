"""What every command shares: parsers whose errors are one line, lines for the user, and Ctrl-C.

Results go to stdout, all that is said on the way to stderr.
"""

import argparse
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from fastgpt.errors import UserError
from fastgpt.train.config import nearest


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


def command_parser(command: str, description: str) -> Parser:
    """The parser of `fastgpt COMMAND`, which prints the description above its options."""
    return Parser(
        prog=f"fastgpt {command}".strip(),
        description=description,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=40, width=110),
    )


def default_words(default: Any) -> str:
    """A default as a help text shows it."""
    if default is None:
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, float) else repr(default) if isinstance(default, str) else str(default)


def counted(number: int, noun: str) -> str:
    """A number of things.

    >>> counted(1, "shard"), counted(2000, "shard")
    ('1 shard', '2,000 shards')
    """
    return f"{number:,} {noun}{'s' * (number != 1)}"


def say(message: str) -> None:
    """A line for the user, on stderr."""
    print(message, file=sys.stderr, flush=True)


def stream(prompt: str, pieces: Iterable[str]) -> None:
    """Print the prompt and then the pieces as they come."""
    sys.stdout.write(prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()


@contextmanager
def signals_held() -> Iterator[None]:
    """Have Ctrl-C and SIGTERM wait until the end of the block, and then act as they would have in it.

    For imports: torch's C++ is loaded by code that ends the process where Python raises something.
    """
    came: list[int] = []
    held = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, lambda got, frame: came.append(got)) for number in held}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])


def import_torch() -> None:
    """Load torch, which takes a second, without being interrupted in its middle."""
    with signals_held():
        import torch  # noqa: F401
