"""One run a folder: refused while another holds it, taken over when that has ended."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys

import pytest

from ulysses_jax.training.lock import RunLock

HOLDER = """
import fcntl, os, sys
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(file, fcntl.LOCK_EX)
os.write(file, b"process %d on elsewhere since then" % os.getpid() + b" and so on" * 9)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_run_is_refused_in_words(tmp_path):
    folder = tmp_path / "run"
    with RunLock(folder) as first:
        assert first.take() == []
        holder = (folder / "lock").read_text()
        assert f"process {os.getpid()} on {socket.gethostname()} since 20" in holder
        with pytest.raises(ValueError, match="is another run's") as refusal:
            RunLock(folder).take()
        for part in (str(folder), holder.strip(), "--run.folder", "remove"):
            assert part in str(refusal.value)
    assert list(folder.iterdir()) == []
    with RunLock(folder) as again:
        assert again.take() == []


def test_what_a_killed_run_left_is_taken_over(tmp_path):
    path = tmp_path / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-S", "-c", HOLDER, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match=f"process {holder.pid} on elsewhere"):
        RunLock(tmp_path).take()
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with RunLock(tmp_path) as lock:
        (note,) = lock.take()
        assert f"left by process {holder.pid} on elsewhere" in note
        assert str(os.getpid()) in path.read_text()
        assert "so on" not in path.read_text()


def test_the_remedy_works(tmp_path):
    """Where a server holds the lock of a host that is gone: remove the file."""
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.take()
    (tmp_path / "lock").unlink()
    with second:
        assert second.take() == []
        with first:
            pass
        assert (tmp_path / "lock").exists()  # the second's


def test_a_file_removed_while_it_is_opened(tmp_path, monkeypatch):
    """The one who held it ends between our open and our lock."""
    first = RunLock(tmp_path)
    first.take()
    flock, calls = fcntl.flock, []

    def late(file, how):
        if not calls:
            first.__exit__(None, None, None)
        calls.append(how)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with RunLock(tmp_path) as second:
        second.take()
        assert len(calls) == 2 and str(os.getpid()) in second.path.read_text()


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def without(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", without)
    with RunLock(tmp_path) as lock:
        (note,) = lock.take()
    assert "without locks (Function not implemented)" in note
    assert list(tmp_path.iterdir()) == []
