"""Standard output whose reader has gone."""

import errno
import io
import subprocess
import sys

import pytest

from ulysses_jax.training import output
from ulysses_jax.training.output import guard_output, print_every_name

SCRIPT = f"""
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("output", {output.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.guard_output()
opened = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
for i in range(3):
    print("line", i, flush=True)
    print("error", i, file=sys.stderr, flush=True)
os.write(opened, b"went on, as file %d" % opened)
"""


@pytest.mark.parametrize(
    "how, printed",
    [("| head -n 1", "line 0\n"), (">&- 2>&- <&-", ""), ("2>&1 | true", "")],
)
def test_a_reader_that_has_gone_ends_nothing(tmp_path, how, printed):
    """Nor does a file that is opened then become the standard output."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = f"set -o pipefail; {sys.executable} -S {script} {tmp_path}/file {how}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert done.stdout == printed
    said = (tmp_path / "file").read_text()
    assert said.startswith("went on") and int(said.split()[-1]) > 2


def test_every_name_prints_for_a_while(monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    with print_every_name():
        print("café \udce9", flush=True)
    assert output.buffer.getvalue() == b"caf\\xe9 \\udce9\n"
    with pytest.raises(UnicodeEncodeError):
        print("café", flush=True)


def test_other_errors_are_errors(monkeypatch):
    """Output that goes to a full disk."""

    class Full(io.StringIO):
        def flush(self):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    monkeypatch.setattr(sys, "stderr", None)
    guard_output()
    with pytest.raises(OSError, match="No space left"):
        print("line", flush=True)
    assert sys.stderr is None and not sys.stdout.isatty()
