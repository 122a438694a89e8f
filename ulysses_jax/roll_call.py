"""A pod's processes find each other before JAX starts, which has no words for it."""

import json
import socket
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from typing import Any, TypeVar

# A pod's hosts come up one after another: that long process 0 waits for the others, and
# they for it. Whoever waits says so before half a minute has passed.
ABSENT_SECONDS, SAYS_SO_SECONDS = 300.0, 20.0
# Of a name that is not known, as a new pod's is at first.
UNKNOWN_SECONDS = 20.0
_LINE_BYTES = 4096
T = TypeVar("T")


def hold(server: socket.socket, address: tuple[str, int], num_processes: int) -> None:
    """Process 0's part: hears all others on the port that will be JAX's, and lets go.

    Args:
      server: listens there; it is closed.
      address: as all processes know it.

    Raises:
      ValueError: the host is not known; some did not come; two say one number; or one
        knows of another number of processes. All that came are told, in the same words.
    """
    heard: dict[int, str] = {0: socket.gethostname()}
    with ExitStack() as stack:
        stack.enter_context(server).settimeout(1.0)
        _tried(lambda: socket.getaddrinfo(*address), address)
        waiting: dict[socket.socket, int | None] = {}  # which process it is
        wait = _Wait(ABSENT_SECONDS)
        try:
            while len(heard) < num_processes:
                missing = sorted(set(range(num_processes)) - set(heard))
                if not wait.goes_on(f"processes {missing} of {num_processes} to come"):
                    raise ValueError(
                        f"of {num_processes} processes {missing} did not come in "
                        f"{wait.seconds:.0f} s: start them, or say how many there are "
                        "(--distributed.num-processes)"
                    )
                with suppress(TimeoutError):
                    other = stack.enter_context(server.accept()[0])
                    waiting[other] = None
                    waiting[other] = _hear(other, heard, num_processes)
                # One that ended while it waited may come again.
                for other in [each for each in waiting if _is_gone(each)]:
                    if (process := waiting.pop(other)) is not None:
                        del heard[process]
        except ValueError as error:
            _answer(waiting, str(error))
            raise
        _answer(waiting, "")


def answer(address: tuple[str, int], process_id: int, num_processes: int) -> None:
    """Another process's part.

    Raises:
      ValueError: the host is not known, process 0 is not there, or what that says.
    """
    call = {"process": process_id, "of": num_processes, "host": socket.gethostname()}

    def ask() -> str | None:
        with socket.create_connection(address, timeout=10) as server:
            server.sendall(json.dumps(call).encode() + b"\n")
            server.settimeout(ABSENT_SECONDS + 10)
            return _line(server)

    line = _tried(ask, address)
    where = f"distributed.coordinator {address[0]}:{address[1]}"
    if line is None:
        raise ValueError(f"{where}: process 0 ended; its own output says why")
    try:
        said = json.loads(line)
    except ValueError:
        raise ValueError(
            f"{where}: another program is there, or a run that is complete: use "
            "another port"
        ) from None
    if said:
        raise ValueError(f"{where}: {said}")


def _tried(attempt: Callable[[], T], address: tuple[str, int]) -> T:
    """What it returns once the host is known and somebody is there."""
    absent, unknown = _Wait(ABSENT_SECONDS), _Wait(UNKNOWN_SECONDS)
    while True:
        try:
            return attempt()
        except (OSError, UnicodeError) as error:
            # UnicodeError: a label of the name is too long, or empty.
            is_unknown = isinstance(error, socket.gaierror | UnicodeError)
            wait = unknown if is_unknown else absent
            if wait.goes_on(f"process 0 at {address[0]}:{address[1]}"):
                time.sleep(1.0)
                continue
            lacks = (
                f"the host {address[0]!r} is not known"
                if is_unknown
                else f"process 0 is not there after {wait.seconds:.0f} s"
            )
            why = getattr(error, "strerror", None) or error
            raise ValueError(
                f"distributed.coordinator {address[0]}:{address[1]}: {lacks} ({why}): "
                "give the host's name or address as all processes know it, and a port "
                "that they reach; process 0 must run there"
            ) from None


class _Wait:
    """Says once what is waited for, and ends."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._started = time.monotonic()
        self._said = False

    def goes_on(self, what: str) -> bool:
        waited = time.monotonic() - self._started
        if waited >= SAYS_SO_SECONDS and not self._said:
            self._said = True
            line = f"waiting for {what}, for {self.seconds:.0f} s at most"
            print(line, file=sys.stderr, flush=True)
        return waited < self.seconds


def _is_gone(other: socket.socket) -> bool:
    other.setblocking(False)
    try:
        return not other.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        other.settimeout(5.0)


def _hear(
    other: socket.socket, heard: dict[int, str], num_processes: int
) -> int | None:
    """Adds who calls; whoever calls in another way, as a port's scanner, is nobody."""
    other.settimeout(5.0)
    try:
        call: Any = json.loads(_line(other) or "")
        process, of, host = int(call["process"]), int(call["of"]), str(call["host"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    who = f"process {process} on {host}"
    if of != num_processes:
        raise ValueError(
            f"{who} knows of {of} processes, process 0 of {num_processes}: start all "
            "with one --distributed.num-processes"
        )
    if process in heard:
        raise ValueError(
            f"two processes are number {process}, on {heard[process]} and on {host}: "
            "give each a --distributed.process-id of its own, from 0 to "
            f"{num_processes - 1}"
        )
    heard[process] = host
    return process


def _answer(waiting: Iterable[socket.socket], said: str) -> None:
    for other in waiting:
        with suppress(OSError):
            other.sendall(json.dumps(said).encode() + b"\n")


def _line(other: socket.socket) -> str | None:
    """One line, of JSON; None: the other end closed before."""
    read = b""
    while not read.endswith(b"\n") and len(read) < _LINE_BYTES:
        if not (more := other.recv(1024)):
            return None
        read += more
    return read.decode(errors="replace")
