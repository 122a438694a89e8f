"""One run a folder: a lock that its process holds, and the system lets go of."""

import errno
import fcntl
import os
import re
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any

# What `flock` says on file systems without it.
_WITHOUT = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)


class RunLock:
    """The lock of a run's folder; a context manager that lets go of it.

    The file `lock` says which host and process hold it. The system lets go when the
    process ends, however it does, so a stale one stops nobody. Whether the lock holds
    between hosts is the file system's affair: on NFS and Lustre mounted with flock it
    does.
    """

    def __init__(self, folder: Path):
        self.path = folder / "lock"
        self._file: int | None = None

    def take(self) -> list[str]:
        """Makes the folder where it is missing, and takes its lock.

        Returns:
          What there is to say: that another's lock was stale, or that the file system
          has no locks.

        Raises:
          ValueError: another run holds it, with its host and process.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        notes: list[str] = []
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = _read(file) or "just started"
                os.close(file)
                if error.errno in _WITHOUT:
                    self.path.unlink(missing_ok=True)
                    return [
                        f"{self.path.parent} is on a file system without locks "
                        f"({error.strerror}): nothing keeps a second run out of it"
                    ]
                if not isinstance(error, BlockingIOError):
                    raise
                raise ValueError(
                    f"{self.path.parent} is another run's, {holder}: wait for it to "
                    "end, or use another run.folder (--run.folder); if it runs no "
                    f"more, remove {self.path}"
                ) from None
            if _is_at(file, self.path):
                break
            os.close(file)  # its holder removed it as we opened it
        if stale := _read(file):
            notes.append(f"{self.path} was left by {stale}, which ended: taken over")
        here = f"process {os.getpid()} on {socket.gethostname()}"
        os.ftruncate(file, 0)
        os.pwrite(file, f"{here} since {time.strftime('%F %T')}\n".encode(), 0)
        self._file = file
        return notes

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(
        self, kind: Any, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            if _is_at(self._file, self.path):
                self.path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None


def was_left(path: Path) -> bool:
    """Whether the process of this host that holds the lock, as it says, is no more."""
    with path.open(encoding="utf-8", errors="replace") as file:
        found = re.match(r"process (\d{1,9}) on (\S+) since", file.read(1000))
    if found is None or found[2] != socket.gethostname():
        return False
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # another user's
    return False


def _read(file: int) -> str:
    return os.pread(file, 1000, 0).decode(errors="replace").strip()


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False
