"""Standard output that may go away, or lack letters: a run goes on all the same."""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

# A pipe whose reader has ended, as in `| head`; a terminal that was closed.
_GONE = (errno.EPIPE, errno.EIO)


def guard_output() -> None:
    """From now on what cannot be read by anyone is dropped, and is no error.

    The run's numbers are in its folder. Standard streams that the caller closed are
    opened to nowhere, so that no file of the run becomes one of them.
    """
    while (file := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(file)
    if sys.stdout is not None:
        sys.stdout = _Guarded(sys.stdout)
    if sys.stderr is not None:
        sys.stderr = _Guarded(sys.stderr)


@contextmanager
def print_every_name() -> Iterator[None]:
    """Inside, a letter that the output's encoding lacks is written as its number.

    Names of files may hold any bytes, and an output be of ASCII alone.
    """
    stream = sys.stdout
    if not isinstance(stream, io.TextIOWrapper | _Guarded):
        yield
        return
    before = stream.errors
    stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        stream.reconfigure(errors=before)


class _Guarded:
    """A text stream that is led to nowhere once its reader is gone."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        if error.errno not in _GONE:
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
