"""Ctrl-C and SIGTERM while a model trains: noted, and acted on after the step in hand."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

SAME_SIGNAL_S = 5.0


class StopSignals:
    """Notes the first Ctrl-C or SIGTERM inside a `with` block; a second one raises KeyboardInterrupt at once.

    Args:
        several: of a job of several processes. torchrun hands a Ctrl-C on to processes that have had it from the terminal already, so
            that there a signal counts as a second one only after SAME_SIGNAL_S.

    Attributes:
        number: the signal that came, else 0.

    Example:
        >>> with StopSignals() as signals:
        ...     signal.raise_signal(signal.SIGINT)
        >>> signals.number == signal.SIGINT
        True
    """

    def __init__(self, several: bool = False) -> None:
        self.several = several
        self.number = 0
        self._time = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python gives signals to no other
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = not self.several or time.monotonic() - self._time > SAME_SIGNAL_S
        if self.number and again:
            raise KeyboardInterrupt
        self.number, self._time = number, time.monotonic()
