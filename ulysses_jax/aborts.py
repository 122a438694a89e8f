"""An abort of this process by a library in C++: what it says, and its exit code."""

import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# A fault of the machines, not of the run: the same command goes on.
LOST = 75
_SIGACTION_BYTES = 512  # more than the system's struct has


@contextmanager
def lost_at_abort(words: Callable[[], str | None]) -> Iterator[None]:
    """Ends with `LOST` where JAX aborts because another process is not there.

    It does so in threads of its own, and its callback for it ends in a `std::bad_cast`
    (jaxlib 0.10.2): so this is a handler of SIGABRT in C. Python's would not run before
    the process has ended.

    Args:
      words: what to say then; None: it was another fault, whose own output says which.
    """
    libc = ctypes.CDLL(None)
    before = ctypes.create_string_buffer(_SIGACTION_BYTES)
    number = int(signal.SIGABRT)

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def aborted(_: int) -> None:
        said = words()
        if said is None:
            os._exit(128 + number)
        os.write(2, f"{said}\n".encode())
        os._exit(LOST)

    libc.sigaction(number, None, before)
    libc.signal(number, aborted)
    try:
        yield
    finally:
        libc.sigaction(number, before, None)
