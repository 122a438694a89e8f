"""How a run ends: in words where it can, with an exit code, and on every process."""

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NoReturn

import jax

from ulysses_jax.aborts import LOST, lost_at_abort
from ulysses_jax.roll_call import Absent
from ulysses_jax.training import store
from ulysses_jax.training.output import guard_output
from ulysses_jax.training.signals import at_signals, that_end

_PACKAGE = Path(__file__).resolve().parents[1]
_ENDED, _ALIVE = "ulysses_jax/ended", "ulysses_jax/alive"
_POLL_SECONDS = 1.0
# Of a process that is killed, or stopped: it sets its key once a second.
_SILENT_SECONDS = 30.0
_MOST_LETTERS = 2000  # of an error, which may have in it what was read


@contextmanager
def ends_in_words(program: str) -> Iterator[None]:
    """Turns an error of the user's input or disk into one line and exit code 2.

    Those are every OSError, and a ValueError that this package raised; of them `Absent`
    ends with `LOST`. Another error is a fault of the program and keeps its traceback;
    on a pod it, too, ends all processes.

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
            words = _short(str(error))
            print(f"{program}: {words}", file=sys.stderr, flush=True)
            stop(LOST if isinstance(error, Absent) else 2, words)
        if jax.distributed.is_initialized():
            traceback.print_exc()
            stop(1, repr(error))
        raise
    finally:
        jax.config.update("jax_traceback_filtering", filtering)


def _short(words: str) -> str:
    """What was wrong stands at their beginning, and the remedy at their end."""
    if len(words) <= _MOST_LETTERS:
        return words
    half = _MOST_LETTERS // 2
    return f"{words[:half]} ... {words[-half:]}"


def _is_ours(error: Exception) -> bool:
    if not isinstance(error, ValueError):
        return False
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return raised_in.resolve().is_relative_to(_PACKAGE)


def stop(code: int, why: str) -> NoReturn:
    """Ends this process; on a pod at once, and the others with it, who are told why."""
    if not jax.distributed.is_initialized():
        sys.exit(code)
    tell_others(code, f"process {store.this_process()} ended the run: {why}")
    if (first := store.get(_ENDED)) is not None:  # of another, whose end this one met
        code, said = int(first.split(" ", 1)[0]), first.split(" ", 1)[1]
        if said != f"process {store.this_process()} ended the run: {why}":
            print(said, file=sys.stderr, flush=True)
    leave_last(code)


def leave_last(code: int) -> NoReturn:
    """`leave`; process 0 of a pod keeps what the others look up, and waits for them."""
    if store.this_process() == 0:
        let_others_look()
    leave(code)


def let_others_look() -> None:
    """On a pod: waits until the others know what they were told."""
    if jax.distributed.is_initialized():
        time.sleep(2 * _POLL_SECONDS)


def tell_others(code: int, why: str) -> None:
    """On a pod: all processes end with this code, for the first reason that is told."""
    if jax.distributed.is_initialized():
        store.set_once(_ENDED, f"{code} {why}")


def with_the_others(interrupted: Callable[[], Any]) -> Callable[[], Any]:
    """`interrupted`, which ends this process: the others of a pod are told before."""

    def end() -> None:
        why = f"process {store.this_process()} was interrupted"
        telling = threading.Thread(target=tell_others, args=(130, why), daemon=True)
        telling.start()
        telling.join(_POLL_SECONDS)  # who interrupts does not wait for a lost store
        if store.this_process() == 0:
            let_others_look()
        interrupted()

    return end


@contextmanager
def ends_with_the_others() -> Iterator[None]:
    """On a pod: ends this process when another one ends by `stop`, or is lost.

    Else it would wait in a collective until a timeout of minutes, or of hours. Each
    process gives a sign of life once a second; process 0 watches all, and all watch it.
    One that was silent for 30 seconds is lost: the others name it and its host, write
    where they stand, and end with `LOST`.
    """
    if not jax.distributed.is_initialized():
        yield
        return
    done, looked = threading.Event(), [time.monotonic()]
    threads = [
        threading.Thread(target=each, args=(done, looked), daemon=True)
        for each in (_look, _watch_the_store)
    ]
    for each in threads:
        each.start()
    try:
        with (
            nullcontext() if store.this_process() == 0 else lost_at_abort(_why_aborted)
        ):
            yield
    except jax.errors.JaxRuntimeError as error:
        # A collective may be the first to see that another process is lost.
        traceback.print_exc()
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            seconds = _SILENT_SECONDS + 3 * _POLL_SECONDS
            print(
                f"is another process lost? {seconds:.0f} s will tell",
                file=sys.stderr,
                flush=True,
            )
            time.sleep(seconds)
        stop(1, repr(error))
    finally:
        done.set()
        for each in threads:
            each.join()
    # Not where it fails: who ends without a word is lost to the others.
    with suppress(jax.errors.JaxRuntimeError):
        store.set_again(f"{_ALIVE}/{store.this_process()}", "ended")


def _look(done: threading.Event, looked: list[float]) -> None:
    """Gives signs of life, reads them; `looked` is when it last asked the store."""
    me, host, beats = store.this_process(), socket.gethostname(), 0
    seen: dict[int, tuple[str, float]] = {}
    while not done.wait(_POLL_SECONDS):
        beats += 1
        looked[0] = time.monotonic()
        with suppress(jax.errors.JaxRuntimeError):  # `_why_aborted` says
            store.set_again(f"{_ALIVE}/{me}", f"{host} {beats}")
        if (ended := store.get(_ENDED)) is not None:
            code, why = ended.split(" ", 1)
            print(why, file=sys.stderr, flush=True)
            if int(code) == LOST:
                say_where()
            leave_last(int(code))
        now = time.monotonic()
        signs = store.get_all(_ALIVE) if me == 0 else {0: store.get(f"{_ALIVE}/0")}
        for process in range(store.num_processes() if me == 0 else 1):
            sign = signs.get(process) or "its host 0"  # before the first sign
            before, since = seen.get(process, ("", now))
            seen[process] = sign, now if sign != before else since
            if now - seen[process][1] > _SILENT_SECONDS and sign != "ended":
                tell_others(LOST, _lost(process, sign.rsplit(" ", 1)[0]))


def _watch_the_store(done: threading.Event, looked: list[float]) -> None:
    """Process 0, which keeps it, may be stopped: it takes a call, and never answers."""
    while not done.wait(_POLL_SECONDS):
        if time.monotonic() - looked[0] > _SILENT_SECONDS:
            print(_lost(0, store.coordinator()[0]), file=sys.stderr, flush=True)
            say_where()
            leave(LOST)


def _lost(process: int, host: str) -> str:
    return (
        f"process {process} on {host} gives no sign of life: it was killed, or "
        "stopped, or its host is gone; the same command goes on from the last "
        "checkpoint, if there is one"
    )


def say_where() -> None:
    """Writes to standard error where each thread of this process stands."""
    print(f"process {store.this_process()} stands here:", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(2, all_threads=True)


def _why_aborted() -> str | None:
    """When process 0 is gone JAX aborts the others."""
    address = store.coordinator()
    try:
        socket.create_connection(address, timeout=5).close()
        return None
    except OSError:
        return f"{Path(sys.argv[0]).name}: {_lost(0, address[0])}"


@contextmanager
def as_program(interrupted: Callable[[], Any]) -> Iterator[None]:
    """Runs a program whose end is its own: no thread of a library's keeps the process.

    Args:
      interrupted: what a signal that ends a run calls, in a thread; it ends the
        process.
    """
    guard_output()
    # The thread alone ends it; without a handler of Python's the system would.
    ends = that_end()
    for each in ends:
        signal.signal(each, lambda *_: None)
    try:
        with at_signals(lambda number: interrupted() if number in ends else None):
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
