"""What ends a run from outside, and when."""

import hashlib
import os
import signal
import threading
import time

import pytest

from ulysses_jax.training.signals import at_ctrl_c, told_to_stop


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_each_tells_and_is_given_back(number):
    number = signal.Signals[number]

    def mine(*_) -> None:
        pytest.fail("it was not told")

    before = signal.signal(number, mine)  # whoever started this may ignore some
    try:
        with told_to_stop(pytest.fail) as stopping:
            assert not stopping.is_set()
            send(number)
            assert stopping.is_set()
        assert signal.getsignal(number) == mine
    finally:
        signal.signal(number, before)
    assert signal.set_wakeup_fd(-1) == -1


def test_only_a_second_ctrl_c_ends_at_once():
    ended = threading.Event()
    with told_to_stop(ended.set) as stopping:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            send(number)
        assert stopping.is_set() and not ended.wait(0.2)
        send(signal.SIGINT)
        assert ended.wait(10)


def test_without_an_end_a_second_ctrl_c_is_the_caller_s():
    mine = []
    before = signal.signal(signal.SIGINT, lambda *_: mine.append(1))
    try:
        with told_to_stop(None) as stopping:
            send(signal.SIGTERM)
            send(signal.SIGINT)
            assert stopping.is_set() and mine == []
            send(signal.SIGINT)
            assert mine == [1]
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_signals_stay_the_caller_s():
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def run():
        with told_to_stop(pytest.fail) as stopping:
            found.append((signal.getsignal(signal.SIGTERM), stopping.is_set()))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [(before, False)]


def test_it_ends_while_python_runs_no_handler():
    """As in XLA's compiler: the main thread does not come back, others run."""
    threads = []
    at = []

    def end():
        threads.append(threading.current_thread())
        at.append(time.monotonic())

    before = signal.signal(signal.SIGINT, lambda *_: at.append(-1.0))
    try:
        with at_ctrl_c(1, end):
            timer = threading.Timer(0.1, send, [signal.SIGINT])
            timer.start()
            # One call into C; it lets other threads run, and no handler.
            hashlib.pbkdf2_hmac("sha256", b"x", b"y", 2_000_000)
            back = time.monotonic()
            timer.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert threads and threads[0] is not threading.main_thread()
    assert 0 < at[0] < back


def test_nohup_stays():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with told_to_stop(pytest.fail) as stopping:
            send(signal.SIGHUP)
            assert not stopping.is_set()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
