"""Signals that end a run: after its step, which is saved, or at once."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Ctrl-C; a scheduler; a terminal that closes; what `sbatch --signal=USR1@60` sends.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# A scheduler may send one twice, to a job and to its step.
_ONE_NOTICE_SECONDS = 2.0


class Stopped(KeyboardInterrupt):
    """A run was told to stop, and has: the message says where."""


def that_end() -> dict[int, Any]:
    """The signals that end a run, with the handlers that they have now."""
    return {
        each: handler
        for each in _SIGNALS
        if (handler := signal.getsignal(each)) is not None  # one that is not Python's
        and not (each == signal.SIGHUP and handler == signal.SIG_IGN)
    }


@contextmanager
def told_to_stop(
    stop: Callable[[str], Any], end: Callable[[], Any] | None
) -> Iterator[None]:
    """Calls `stop` at Ctrl-C, SIGTERM, SIGHUP or SIGUSR1, and `end` at the second.

    Both at once, in a thread: while the main thread waits for a device Python runs no
    handler of signals. The second is the same signal again: Ctrl-C whenever it comes,
    another 2 seconds later or more.

    Without `end` the second Ctrl-C has the handler from before, and no other ends
    anything. A SIGHUP that is ignored, as under nohup, stays so. In another thread than
    the main one, which alone may handle signals, all stay as they are.

    Args:
      stop: is called once, with the signal's name.
      end: ends the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = that_end()
    first: dict[int, float] = {}

    def tell(number: int) -> None:
        if number not in before:
            return
        now = time.monotonic()
        if not first:
            stop(signal.Signals(number).name)
        elif number in first and end is not None:
            if number == signal.SIGINT or now - first[number] >= _ONE_NOTICE_SECONDS:
                end()
        first.setdefault(number, now)

    def handle(number: int, _: Any) -> None:
        if number == signal.SIGINT and end is None:
            signal.signal(number, before[signal.SIGINT])

    for each in before:
        signal.signal(each, handle)
    try:
        with at_signals(tell):
            yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def at_signals(tell: Callable[[int], Any]) -> Iterator[None]:
    """Calls `tell` in a thread with the number of each signal that comes.

    While the main thread compiles, or waits for a device, Python runs no handler of
    signals; and an exception that one raises may be lost in a library's callback. A
    signal must have a handler of Python's, which may do nothing.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def listen() -> None:
        while number := os.read(read, 1):  # nothing: the other end is closed
            tell(number[0])
        os.close(read)

    threading.Thread(target=listen, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(write)
