"""Signals that end a run: after its step, which is saved, or at once."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Ctrl-C; a scheduler; a terminal that closes; what `sbatch --signal=USR1@60` sends.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@contextmanager
def told_to_stop(end: Callable[[], Any]) -> Iterator[threading.Event]:
    """Set by Ctrl-C, SIGTERM, SIGHUP or SIGUSR1; a second Ctrl-C calls `end` at once.

    A SIGHUP that is ignored, as under nohup, stays so.
    """
    event = threading.Event()
    before = {
        each: signal.signal(each, lambda *_: event.set())
        for each in _SIGNALS
        if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN
    }
    try:
        with at_ctrl_c(2, end):
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
