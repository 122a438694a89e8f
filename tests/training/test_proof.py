"""What proving a checkpoint leaves in the process that does it."""

import subprocess
import sys

# In a long run glibc has freed something large, and then takes megabytes from arenas.
IN_THREADS = """
import ctypes, sys, threading
from pathlib import Path
from ulysses_jax.training.proof import write_part
ctypes.CDLL(None).mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
def resident_bytes():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
together = threading.Barrier(33)
def prove(number):
    together.wait()
    write_part(Path(sys.argv[1]), number)
    together.wait()
threads = [threading.Thread(target=prove, args=[number]) for number in range(32)]
for thread in threads:
    thread.start()
before = resident_bytes()
together.wait()
together.wait()
for thread in threads:
    thread.join()
print(resident_bytes() - before)
"""


def test_threads_leave_no_buffers(tmp_path):
    for number in range(32):
        folder = tmp_path / f"ocdbt.process_{number}"
        folder.mkdir()
        (folder / "small").write_bytes(b"1234")
    ended = subprocess.run(
        [sys.executable, "-c", IN_THREADS, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) < 2**20  # not even one
