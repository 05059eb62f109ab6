"""Requests to stop: Ctrl-C, and the SIGTERM of a preemption or a stopped job.

The first one lets the run finish what must not be cut in two; a second one ends it at once.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _say(text: str) -> None:
    os.write(2, f"{text}\n".encode())  # a handler may interrupt a buffered write, which must not be entered twice


class StopRequest:
    """Holds a request to stop until it suits; use as a context manager around everything that should end tidily.

    Example: a signal during the learner's step only sets `requested`, and the loop stops after the step.  A signal
    while it waits for a batch, inside `interruptible`, raises KeyboardInterrupt there.

    Signals reach the main thread only; entered in another thread, nothing is installed and nothing is requested.

    Args:
        say: told of the first request, inside the signal handler.
    """

    def __init__(self, say: Callable[[str], None] = _say) -> None:
        self.requested = False
        self._say = say
        self._is_interruptible = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let a request end the block at once, also one that came before it.

        Raises:
            KeyboardInterrupt: when a stop is requested.
        """
        outer, self._is_interruptible = self._is_interruptible, True
        try:
            if self.requested:
                raise KeyboardInterrupt
            yield
        finally:
            self._is_interruptible = outer

    def _take(self, number: int, frame: FrameType | None) -> None:
        is_first, self.requested = not self.requested, True
        if is_first:
            name = signal.Signals(number).name
            self._say(f"{name}: stopping, with a checkpoint of the last finished step; a second one ends at once")
        if self._is_interruptible or not is_first:
            raise KeyboardInterrupt
