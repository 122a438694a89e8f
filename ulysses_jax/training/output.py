"""Standard output that may go away: a run goes on when nobody reads it any more."""

import errno
import os
import sys
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
