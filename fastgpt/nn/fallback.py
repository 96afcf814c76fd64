"""What drop-in modules do with input that the ops do not take: torch's own forward, which computes it or raises torch's own error."""

import functools
import logging
from collections.abc import Callable
from typing import Any

_log = logging.getLogger("fastgpt")


@functools.cache
def log_fallback(what: str) -> None:
    """Says once a process that torch computes `what`."""
    _log.warning("%s is computed by torch: the fastgpt op does not support it", what)


def or_torch(
    theirs: Callable[..., Any], what: str, *, quiet: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: where the op refuses its input (ValueError, TypeError), `theirs` gets the same arguments.

    So a wrong shape raises what torch raises, and what torch takes beside floating-point numbers (relu of integers) still works.
    `quiet` where that is usual and not worth a line in the log.
    """

    def wrap(ours: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(ours)
        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                return ours(*args, **kwargs)
            except (TypeError, ValueError):
                pass
            result = theirs(*args, **kwargs)
            if not quiet:
                log_fallback(f"{what} of such input")
            return result

        return run

    return wrap
