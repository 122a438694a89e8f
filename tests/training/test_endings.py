"""Whose fault an error is, and how a process ends."""

import importlib.util
import signal
import sys
import threading
from pathlib import Path

import jax
import pytest

from ulysses_jax.aborts import lost_at_abort
from ulysses_jax.config_file import load
from ulysses_jax.roll_call import Absent
from ulysses_jax.training import endings, phases
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
    # Of a machine, and not of the user's.
    absent = module(site / "ulysses_jax" / "roll_call.py")
    assert ended(lambda: absent.fail(Absent("did not come"))) == endings.LOST
    assert capfd.readouterr().err == "python -m mine: did not come\n"
    # A disk's, whoever wrote to it.
    assert ended(lambda: library.fail(OSError("full"))) == 2
    assert capfd.readouterr().err == "python -m mine: full\n"


def test_a_value_as_long_as_a_file_is_not_all_of_the_words(tmp_path, capfd):
    """What is wrong stands at their beginning, the remedy at their end."""
    path = tmp_path / "run.yaml"
    path.write_text(f"training: {{num_steps: {'x' * 60_000}}}")
    assert ended(lambda: load(path)) == 2
    words = capfd.readouterr().err
    assert len(words) < 2100 and " ... " in words
    assert words.startswith(f"python -m mine: {path}: training.num_steps must be int")
    assert words.endswith("x'\n")


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


@pytest.fixture
def pod(monkeypatch):
    """This process as one of several; what it does, in order."""
    did = []

    class Store:
        process, told = 0, None

        def this_process(self):
            return self.process

        def num_processes(self):
            return 1

        def get(self, key):
            return self.told

        def get_all(self, folder):
            return {}

        def set_once(self, key, value):
            self.told = value
            did.append("told")

        def set_again(self, key, value):
            did.append(value)

    def leave(code):
        did.append(code)
        raise Exited(code)

    store = Store()
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(endings, "store", store)
    monkeypatch.setattr(endings, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(endings.os, "_exit", leave)
    monkeypatch.setattr(endings, "say_where", lambda: None)
    monkeypatch.setattr(phases, "say_where", lambda: None)
    monkeypatch.setattr(endings.time, "sleep", lambda _: did.append("waits"))
    return store, did


@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize("how", ["another", "itself", "a hang", "a second signal"])
def test_process_0_leaves_last(pod, how, process):
    """It keeps what the others look up: who found it gone would say that it is lost."""
    store, did = pod
    store.process = process
    if how == "another":
        store.told = "2 process 3 ended the run: why"
        with pytest.raises(Exited):
            endings._look(threading.Event(), [0.0])
    elif how == "itself":
        with pytest.raises(Exited):
            endings.stop(2, "why")
    elif how == "a hang":
        with pytest.raises(Exited):
            phases.Phases()._end("compute", 1.0)
    else:
        endings.with_the_others(lambda: did.append(130))()
    code = {"a hang": endings.LOST, "a second signal": 130}.get(how, 2)
    did = [each for each in did if not isinstance(each, str) or each == "waits"]
    waits = process == 0 or how == "a hang"  # where the others stand is seen before
    assert did == ["waits"] * waits + [code]


@pytest.mark.parametrize(
    "sign, host", [(None, "its host"), ("node7 3", "node7"), ("ended", None)], ids=str
)
def test_who_gives_no_sign_of_life_is_lost(pod, monkeypatch, capsys, sign, host):
    """It is named with its host, and where this process stands is said; one that has
    ended gives no more, and is not lost."""
    store, did = pod
    signs = {0: "here 0"} | ({} if sign is None else {1: sign})

    def set_again(key, value):
        signs[0] = value

    monkeypatch.setattr(store, "num_processes", lambda: 2)
    monkeypatch.setattr(store, "set_again", set_again)
    monkeypatch.setattr(store, "get_all", lambda _: dict(signs))
    monkeypatch.setattr(endings, "_SILENT_SECONDS", 0.2)
    monkeypatch.setattr(endings, "say_where", lambda: did.append("stacks"))
    done = threading.Event()
    ends = threading.Timer(1.0, done.set)
    ends.start()
    if host is None:
        endings._look(done, [0.0])
        assert did == []
        return
    with pytest.raises(Exited) as exited:
        endings._look(done, [0.0])
    ends.cancel()
    assert exited.value.args == (endings.LOST,) and did[:2] == ["told", "stacks"]
    said = f"process 1 on {host} gives no sign of life: it was killed"
    assert capsys.readouterr().err.startswith(said)


def test_the_first_reason_is_that_of_all(pod, monkeypatch, capsys):
    """One that is lost may break another's collective: no fault of the program."""
    store, _ = pod
    store.told = f"{endings.LOST} process 3 on node3 gives no sign of life"
    monkeypatch.setattr(store, "set_once", lambda *_: False)
    with pytest.raises(Exited) as exited:
        endings.stop(1, "Gloo failed")
    assert exited.value.args == (endings.LOST,)
    assert "process 3 on node3 gives no sign" in capsys.readouterr().err


def test_who_fails_without_a_word_has_not_ended(pod):
    """The others would wait for it as for one whose work is done."""
    _, did = pod
    with pytest.raises(KeyboardInterrupt), endings.ends_with_the_others():
        raise KeyboardInterrupt
    assert "ended" not in did
    with endings.ends_with_the_others():
        pass
    assert did[-1] == "ended"


@pytest.mark.parametrize(
    "error, waits",
    [("RESOURCE_EXHAUSTED: Out of memory", False), ("INTERNAL: Gloo", True)],
)
def test_an_error_of_jax_is_said_at_once(pod, monkeypatch, capsys, error, waits):
    """Before it is known whether another process was lost, which would be why."""
    _, did = pod
    said = []
    sleeps = lambda seconds: said.append((seconds, capsys.readouterr().err))  # noqa: E731
    monkeypatch.setattr(endings.time, "sleep", sleeps)
    with pytest.raises(Exited), endings.ends_with_the_others():
        raise jax.errors.JaxRuntimeError(error)
    assert did[-1] == 1
    long = [text for seconds, text in said if seconds > 1]
    assert len(long) == waits
    if waits:
        assert error in long[0] and "Traceback" in long[0]
    else:
        assert error in said[0][1]  # while process 0 lets the others look


def test_the_handler_of_aborts_is_as_it_was():
    """Python's own, or that of whoever called: with its flags."""
    before = signal.signal(signal.SIGABRT, lambda number, _: heard.append(number))
    heard = []
    try:
        with lost_at_abort(lambda: None):
            pass
        signal.raise_signal(signal.SIGABRT)
        assert heard == [signal.SIGABRT]
    finally:
        signal.signal(signal.SIGABRT, before)


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_before_the_first_step_has_words(monkeypatch, number):
    """The system would end the process without, and with a code that means a fault."""
    number, heard = signal.Signals[number], threading.Event()
    monkeypatch.setattr(endings, "guard_output", lambda: None)
    monkeypatch.setattr(endings.os, "_exit", lambda _: None)
    before = {each: signal.getsignal(each) for each in endings.that_end()}
    signal.signal(number, lambda *_: pytest.fail("the handler from before"))
    try:
        with as_program(heard.set):
            signal.raise_signal(number)
            assert heard.wait(10)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
