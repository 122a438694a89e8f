"""Whose fault an error is, and how a process ends."""

import importlib.util
import sys
from pathlib import Path

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


def ended(function):
    with pytest.raises(SystemExit) as stopped:
        with ends_in_words("python -m mine"):
            function()
    return stopped.value.code


def test_whose_fault_an_error_is(tmp_path, capfd, monkeypatch):
    """A library keeps its traceback, also one that is installed beside this one."""
    (tmp_path / "file").write_text("")
    assert ended(lambda: check_folder(tmp_path / "file")) == 2
    assert capfd.readouterr().err.startswith("python -m mine: run.folder")
    site = tmp_path / "site-packages"
    library = module(site / "optax.py")
    monkeypatch.setattr(endings, "_PACKAGE", site / "ulysses_jax")
    ours = module(site / "ulysses_jax" / "training" / "run.py")
    assert ended(lambda: ours.fail(ValueError("no such mesh"))) == 2
    assert capfd.readouterr().err == "python -m mine: no such mesh\n"
    for error in (ValueError("of optax"), KeyError("of optax"), RuntimeError()):
        with pytest.raises(type(error)), ends_in_words("python -m mine"):
            library.fail(error)
    # Also where JAX leaves its own frames out of the traceback.
    jax_s = module(site / "ulysses_jax" / "ours.py", CALLS_JAX)
    with pytest.raises(ValueError, match="compiler_options"):
        with ends_in_words("python -m mine"):
            jax_s.fail()
    # A disk's, whoever wrote to it.
    assert ended(lambda: library.fail(OSError("full"))) == 2
    assert capfd.readouterr().err == "python -m mine: full\n"


def test_the_package_is_the_one_that_runs():
    assert Path(endings.__file__).is_relative_to(endings._PACKAGE)
    assert endings._PACKAGE.name == "ulysses_jax"


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
