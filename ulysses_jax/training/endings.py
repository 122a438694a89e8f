"""How a run ends: in words where it can, with an exit code, and on every process."""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import jax
from jax._src import distributed  # its store of keys and values has no public door

from ulysses_jax.training.output import guard_output
from ulysses_jax.training.signals import at_ctrl_c

_PACKAGE = Path(__file__).resolve().parents[1]
_ENDED = "ulysses_jax/ended"
_POLL_SECONDS = 1.0


@contextmanager
def ends_in_words(program: str) -> Iterator[None]:
    """Turns an error of the user's input or disk into one line and exit code 2.

    Those are every OSError, and a ValueError that this package raised. Another error is
    a fault of the program and keeps its traceback; on a pod it, too, ends all
    processes.

    Args:
      program: what the line begins with.
    """
    # With its own frames taken out, what JAX raises would look like this package's.
    filtering = jax.config.jax_traceback_filtering  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_traceback_filtering", "off")
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or _is_ours(error):
            print(f"{program}: {error}", file=sys.stderr, flush=True)
            stop(2, str(error))
        if jax.distributed.is_initialized():
            traceback.print_exc()
            stop(1, repr(error))
        raise
    finally:
        jax.config.update("jax_traceback_filtering", filtering)


def _is_ours(error: Exception) -> bool:
    if not isinstance(error, ValueError):
        return False
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return raised_in.resolve().is_relative_to(_PACKAGE)


def stop(code: int, why: str) -> NoReturn:
    """Ends this process; on a pod at once, and the others with it, who are told why."""
    if not jax.distributed.is_initialized():
        sys.exit(code)
    try:
        _store().key_value_set(
            _ENDED, f"{code} process {jax.process_index()} ended the run: {why}"
        )
    except jax.errors.JaxRuntimeError:
        pass  # another was first, or process 0 is gone
    if jax.process_index() == 0:
        time.sleep(2 * _POLL_SECONDS)  # its process keeps what the others look up
    leave(code)


@contextmanager
def ends_with_the_others() -> Iterator[None]:
    """On a pod: ends this process when another one ends by `stop`, with its code.

    Else it would wait in a collective until a timeout of minutes, or of hours.
    """
    if not jax.distributed.is_initialized():
        yield
        return
    store, done = _store(), threading.Event()

    def look() -> None:
        while not done.wait(_POLL_SECONDS):
            try:
                code, why = store.key_value_try_get(_ENDED).split(" ", 1)
            except jax.errors.JaxRuntimeError:
                continue  # nobody has
            print(why, file=sys.stderr, flush=True)
            leave(int(code))

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    try:
        yield
    finally:
        done.set()
        looking.join()


def _store() -> Any:
    """The keys and values that all processes of a pod see."""
    return distributed.global_state.client


@contextmanager
def as_program(interrupted: Callable[[], Any]) -> Iterator[None]:
    """Runs a program whose end is its own: no thread of a library's keeps the process.

    Args:
      interrupted: what Ctrl-C calls, in a thread; it ends the process.
    """
    guard_output()
    # The thread alone ends it; without a handler of Python's the system would.
    signal.signal(signal.SIGINT, lambda *_: None)
    try:
        with at_ctrl_c(1, interrupted):
            yield
    except SystemExit as end:
        if not end.code:
            raise
        if not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
        leave(end.code if isinstance(end.code, int) else 1)
    except BaseException:
        traceback.print_exc()
        leave(1)


def leave(code: int) -> NoReturn:
    """Ends this process without a word to other threads, which may hang."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(OSError):
                stream.flush()
    os._exit(code)
