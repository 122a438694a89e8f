"""A pod's processes find each other before JAX starts, which has no words for it.

Process 0 listens on the port that will be JAX's. Each other one connects and says one
line, a JSON object: its number, how many there are, its host. Process 0 answers in
lines, each a JSON list of a kind and a sentence: `heard` at once, `waiting` once in a
while when some are long in coming, and at last `complete`, `absent` or `wrong`.
"""

import json
import selectors
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

# A pod's hosts come up one after another. Whoever waits says so before half a minute
# has passed, and again and again: so does one that came late.
SAYS_SO_SECONDS = 15.0
# Of a port where another program answers: one that is about to end, as a run before.
STRANGER_SECONDS = 10.0
# Whoever takes longer for a line is another program.
_LINE_SECONDS = 5.0
_LINE_BYTES = 4096
_MOST_UNHEARD = 64
_KINDS = ("heard", "waiting", "complete", "absent", "wrong")


class Absent(ValueError):
    """A process, or its host, is not there: a fault of machines, and not of what they
    were told. Another start may find it."""


def hold(server: socket.socket, num_processes: int, wait_seconds: float) -> None:
    """Process 0's part: hears all others on the port that will be JAX's, and lets go.

    Whoever says anything else, as a port's scanner, is nobody: it is heard beside the
    others, for 4 KiB and 5 seconds.

    Args:
      server: listens there; it is closed.
      wait_seconds: for those that are not there.

    Raises:
      Absent: some did not come.
      ValueError: two say one number; or one knows of another number of processes. In
        either case all that came are told, in the same words.
    """
    with ExitStack() as stack:
        stack.enter_context(server)
        roll = _Roll(server, num_processes)
        stack.callback(roll.close)
        wait = _Wait(wait_seconds)
        try:
            while missing := roll.missing():
                names = f"processes {missing} of {num_processes}"
                if (line := wait.says_so(f"{names} to come")) is not None:
                    roll.tell("waiting", line)
                if wait.is_over():
                    raise Absent(
                        f"of {num_processes} processes {missing} did not come in "
                        f"{wait.seconds:.0f} s (distributed.wait_seconds): start them, "
                        "or say how many there are (--distributed.num-processes)"
                    )
                roll.listen(1.0)
        except ValueError as error:
            roll.tell("absent" if isinstance(error, Absent) else "wrong", str(error))
            raise
        roll.tell("complete", "")


def answer(
    address: tuple[str, int], process_id: int, num_processes: int, wait_seconds: float
) -> None:
    """Another process's part.

    Args:
      wait_seconds: for process 0; how long it waits for others is its own to say.

    Raises:
      Absent: process 0 is not there, or has ended, or others are not there.
      ValueError: another program is there; or what process 0 says.
    """
    call = {"process": process_id, "of": num_processes, "host": socket.gethostname()}
    where = f"distributed.coordinator {address[0]}:{address[1]}"
    wait = _Wait(wait_seconds)
    stranger: _Wait | None = None
    while True:
        try:
            with socket.create_connection(address, timeout=10) as server:
                server.sendall(json.dumps(call).encode() + b"\n")
                return _told(server, where)
        except _Stranger as error:
            why = f"{error}: another program is there, or a run that is complete"
            stranger = stranger or _Wait(STRANGER_SECONDS)
            if stranger.is_over():
                raise ValueError(f"{where}: {why}: use another port") from None
        except (OSError, UnicodeError) as error:
            why, stranger = _why(error), None
            if isinstance(error, socket.gaierror):
                why = f"the host {address[0]!r} is not known, {why}"
            _refuse_name(address, error)
            if wait.is_over():
                raise Absent(
                    f"{where}: process 0 is not there after {wait.seconds:.0f} s "
                    f"(distributed.wait_seconds; {why}): give its host's name or "
                    "address as all processes know it, and a port that they reach; "
                    "process 0 must run there"
                ) from None
        wait.says_so(f"process 0 at {address[0]}:{address[1]} ({why})")
        time.sleep(1.0)


def find_host(address: tuple[str, int], wait_seconds: float) -> None:
    """Process 0's own host, which has a name as all know it: a new pod's comes late.

    Args:
      wait_seconds: for the name.

    Raises:
      ValueError: nobody knows it.
    """
    wait = _Wait(wait_seconds)
    while True:
        try:
            socket.getaddrinfo(*address)
            return
        except (OSError, UnicodeError) as error:
            _refuse_name(address, error)
            if wait.is_over():
                raise _no_such_host(address, error) from None
            wait.says_so(f"the name of this host, {address[0]} ({_why(error)})")
            time.sleep(1.0)


def _refuse_name(address: tuple[str, int], error: Exception) -> None:
    if isinstance(error, UnicodeError):  # a label of it is too long, or empty
        raise _no_such_host(address, error) from None


def _no_such_host(address: tuple[str, int], error: Exception) -> ValueError:
    return ValueError(
        f"distributed.coordinator {address[0]}:{address[1]}: the host {address[0]!r} "
        f"is not known ({_why(error)}): give its name or address as all processes know "
        "it"
    )


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


class _Stranger(Exception):
    """Who is there is no process 0 that waits."""


def _told(server: socket.socket, where: str) -> None:
    """Hears process 0 to its last line, and raises what that says."""
    server.settimeout(_LINE_SECONDS)
    is_heard = False
    try:
        for kind, said in _lines(server):
            if kind == "complete":
                return
            if kind == "waiting":
                print(said, file=sys.stderr, flush=True)
            elif kind in ("absent", "wrong"):
                raise (Absent if kind == "absent" else ValueError)(f"{where}: {said}")
            is_heard = True
            server.settimeout(2 * SAYS_SO_SECONDS + _LINE_SECONDS)
    except OSError as error:
        if not is_heard:
            raise _Stranger(_why(error)) from None
    if not is_heard:
        raise _Stranger("it closed the connection")
    raise Absent(
        f"{where}: process 0 ended, or hangs; its own output says why, if it could"
    )


def _lines(server: socket.socket) -> Iterator[tuple[str, str]]:
    read = b""
    while more := server.recv(1024):
        read += more
        while b"\n" in read:
            line, read = read.split(b"\n", 1)
            try:
                kind, said = json.loads(line)
                assert kind in _KINDS
            except (ValueError, TypeError, RecursionError, AssertionError):
                raise _Stranger("it says something else") from None
            yield kind, str(said)
        if len(read) > _LINE_BYTES:
            raise _Stranger("it says something else")


class _Wait:
    """Says once in a while what is waited for, and ends."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._started = self._said = time.monotonic()

    def is_over(self) -> bool:
        return time.monotonic() - self._started >= self.seconds

    def says_so(self, what: str) -> str | None:
        """The line, when it is time for it."""
        now = time.monotonic()
        if now - self._said < SAYS_SO_SECONDS:
            return None
        self._said = now
        left = max(0.0, self._started + self.seconds - now)
        line = f"waiting for {what}, for {left:.0f} s more at most"
        print(line, file=sys.stderr, flush=True)
        return line


class _Caller:
    """One that has connected.

    Attributes:
      process: which one it is, when it has said so.
      since: when it came.
      read: of its line, so far.
    """

    def __init__(self) -> None:
        self.process: int | None = None
        self.since = time.monotonic()
        self.read = b""


class _Roll:
    """Who has come, and said who it is."""

    def __init__(self, server: socket.socket, num_processes: int):
        self._server, self._num = server, num_processes
        self._heard: dict[int, str] = {0: socket.gethostname()}  # and its host
        self._callers: dict[socket.socket, _Caller] = {}
        self._selector = selectors.DefaultSelector()
        server.setblocking(False)
        self._selector.register(server, selectors.EVENT_READ)

    def missing(self) -> list[int]:
        return [each for each in range(self._num) if each not in self._heard]

    def listen(self, seconds: float) -> None:
        """Takes what comes in so long.

        Raises:
          ValueError: who calls is not one of these processes.
        """
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._server:
                with suppress(OSError):
                    self._accept()
            elif isinstance(key.fileobj, socket.socket):
                self._hear(key.fileobj)
        now = time.monotonic()
        unheard = [s for s, each in self._callers.items() if each.process is None]
        for place, other in enumerate(reversed(unheard)):  # the latest first
            late = now - self._callers[other].since > _LINE_SECONDS
            if late or place >= _MOST_UNHEARD:
                self._drop(other)

    def tell(self, kind: str, said: str) -> None:
        """All that have come."""
        for other, caller in self._callers.items():
            if caller.process is not None:
                _say(other, kind, said)

    def close(self) -> None:
        for other in [*self._callers]:
            self._drop(other)
        self._selector.close()

    def _accept(self) -> None:
        other, _ = self._server.accept()
        other.setblocking(False)
        self._callers[other] = _Caller()
        self._selector.register(other, selectors.EVENT_READ)

    def _hear(self, other: socket.socket) -> None:
        caller = self._callers[other]
        try:
            more = other.recv(_LINE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            more = b""
        if not more:  # one that ended while it waited may come again
            if caller.process is not None:
                del self._heard[caller.process]
            self._drop(other)
        elif caller.process is None:
            caller.read += more
            if b"\n" in caller.read:
                caller.process = self._take(caller.read.split(b"\n", 1)[0], other)
                caller.read = b""
                if caller.process is None:
                    self._drop(other)
            elif len(caller.read) > _LINE_BYTES:
                self._drop(other)

    def _take(self, line: bytes, other: socket.socket) -> int | None:
        """Which process says so; None: whoever calls in another way."""
        try:
            call: Any = json.loads(line)
            process, of, host = call["process"], call["of"], str(call["host"])[:255]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        if type(process) is not int or type(of) is not int or not 0 < process < of:
            return None
        who = f"process {process} on {host}"
        problem = None
        if of != self._num:
            problem = (
                f"{who} knows of {of} processes, process 0 of {self._num}: start all "
                "with one --distributed.num-processes"
            )
        elif process in self._heard:
            problem = (
                f"two processes are number {process}, on {self._heard[process]} and on "
                f"{host}: give each a --distributed.process-id of its own, from 0 to "
                f"{self._num - 1}"
            )
        if problem is not None:
            _say(other, "wrong", problem)
            raise ValueError(problem)
        self._heard[process] = host
        _say(other, "heard", "")
        return process

    def _drop(self, other: socket.socket) -> None:
        self._selector.unregister(other)
        del self._callers[other]
        other.close()


def _say(other: socket.socket, kind: str, said: str) -> None:
    with suppress(OSError):
        other.sendall(json.dumps([kind, said]).encode() + b"\n")
