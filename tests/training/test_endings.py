"""Whose fault an error is, and how a process ends."""

import importlib.util
import sys

import pytest

from ulysses_jax.training import endings
from ulysses_jax.training.endings import as_program, ends_in_words
from ulysses_jax.training.preflight import check_folder


def module(path, text="def fail(error):\n    raise error\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


CALLS_JAX = """
import jax
def fail():
    nested = jax.jit(lambda x: x, compiler_options={"xla_cpu_enable_fast_math": True})
    jax.jit(lambda x: nested(x))(1.0)
"""


def ended(function, program):
    with pytest.raises(SystemExit) as stopped:
        with ends_in_words(str(program)):
            function()
    return stopped.value.code


def test_whose_fault_an_error_is(tmp_path, capfd):
    """A library keeps its traceback, also one that is installed under the checkout."""
    ours = module(tmp_path / "train.py")
    assert ended(lambda: ours.fail(ValueError("no such mesh")), ours.__file__) == 2
    assert capfd.readouterr().err == "train.py: no such mesh\n"
    (tmp_path / "file").write_text("")
    assert ended(lambda: check_folder(tmp_path / "file"), ours.__file__) == 2
    assert "run.folder" in capfd.readouterr().err
    library = module(tmp_path / ".venv" / "lib" / "optax.py")
    for error in (ValueError("of optax"), KeyError("of optax"), RuntimeError()):
        with pytest.raises(type(error)), ends_in_words(ours.__file__):
            library.fail(error)
    # Also where JAX leaves its own frames out of the traceback.
    jax_s = module(tmp_path / "ours.py", CALLS_JAX)
    with pytest.raises(ValueError, match="compiler_options"):
        with ends_in_words(jax_s.__file__):
            jax_s.fail()
    # A disk's, whoever wrote to it.
    assert ended(lambda: library.fail(OSError("full")), ours.__file__) == 2
    assert capfd.readouterr().err == "train.py: full\n"


class Exited(BaseException):
    pass


@pytest.mark.parametrize(
    "error, code, said",
    [
        (SystemExit(2), 2, ""),
        (SystemExit("why"), 1, "why"),
        (ZeroDivisionError("by"), 1, "ZeroDivisionError: by"),
        (KeyboardInterrupt(), 1, "KeyboardInterrupt"),
    ],
    ids=repr,
)
def test_no_thread_keeps_a_process_that_failed(monkeypatch, capsys, error, code, said):
    def leave(code):
        raise Exited(code)

    monkeypatch.setattr(endings.os, "_exit", leave)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    monkeypatch.setattr(endings.signal, "signal", lambda *_: None)
    with pytest.raises(Exited) as exited:
        with as_program(pytest.fail):
            raise error
    assert exited.value.args == (code,)
    assert said in capsys.readouterr().err


def test_a_program_that_succeeds_ends_as_any(monkeypatch):
    monkeypatch.setattr(endings.os, "_exit", pytest.fail)
    monkeypatch.setattr(endings.signal, "signal", lambda *_: None)
    stdout = sys.stdout
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    with as_program(pytest.fail):
        assert sys.stdout is not stdout
    with pytest.raises(SystemExit), as_program(pytest.fail):
        raise SystemExit(0)
