"""Signals that end a run: after its step, which is saved, or at once."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

# Ctrl-C; a scheduler; a terminal that closes; what `sbatch --signal=USR1@60` sends.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Stopped(KeyboardInterrupt):
    """A run was told to stop, and has: the message says where."""


@contextmanager
def told_to_stop(end: Callable[[], Any] | None) -> Iterator[threading.Event]:
    """Set by Ctrl-C, SIGTERM, SIGHUP or SIGUSR1; a second Ctrl-C calls `end` at once.

    Without `end` the second one has the handler from before. A SIGHUP that is ignored,
    as under nohup, stays so. In another thread than the main one, which alone may
    handle signals, all stay as they are.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {
        each: handler
        for each in _SIGNALS
        if (handler := signal.getsignal(each)) is not None  # one that is not Python's
        and not (each == signal.SIGHUP and handler == signal.SIG_IGN)
    }

    def tell(number: int, _: Any) -> None:
        event.set()
        if number == signal.SIGINT and end is None:
            signal.signal(number, before[signal.SIGINT])

    for each in before:
        signal.signal(each, tell)
    try:
        with nullcontext() if end is None else at_ctrl_c(2, end):
            yield event
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def at_ctrl_c(times: int, end: Callable[[], Any]) -> Iterator[None]:
    """Calls `end` in a thread when Ctrl-C is pressed so many times.

    While the main thread compiles, or waits for a device, Python runs no handler of
    signals; and an exception that one raises may be lost in a library's callback.
    SIGINT must have a handler of Python's, which may do nothing.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def count() -> None:
        pressed = 0
        while number := os.read(read, 1):  # nothing: the other end is closed
            pressed += number[0] == signal.SIGINT
            if pressed == times:
                end()
        os.close(read)

    threading.Thread(target=count, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(write)
