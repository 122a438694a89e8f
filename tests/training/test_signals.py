"""What ends a run from outside, and when."""

import hashlib
import os
import signal
import threading
import time

import pytest

from ulysses_jax.training import signals
from ulysses_jax.training.signals import at_signals, told_to_stop


def send(number):
    os.kill(os.getpid(), number)


def until(found, count):
    """A thread of its own adds to it."""
    end = time.monotonic() + 10
    while len(found) < count and time.monotonic() < end:
        time.sleep(0.01)
    return found


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_each_tells_and_is_given_back(number):
    number = signal.Signals[number]

    def mine(*_) -> None:
        pytest.fail("it was not told")

    before = signal.signal(number, mine)  # whoever started this may ignore some
    told = []
    try:
        with told_to_stop(told.append, pytest.fail):
            assert not told
            send(number)
            assert until(told, 1) == [number.name]
        assert signal.getsignal(number) == mine
    finally:
        signal.signal(number, before)
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_the_same_signal_again_ends_at_once(monkeypatch, number):
    """Other ones are further notices; so is one that a scheduler sends twice."""
    number = signal.Signals[number]
    told, ended = [], []
    with told_to_stop(told.append, lambda: ended.append(1)):
        send(number)
        until(told, 1)
        for other in {signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1} - {number}:
            send(other)
        if number != signal.SIGINT:
            send(number)
            time.sleep(0.2)
            assert not ended
            monkeypatch.setattr(signals, "_ONE_NOTICE_SECONDS", 0.0)
        send(number)
        assert until(ended, 1) and told == [number.name]


def test_without_an_end_a_second_ctrl_c_is_the_caller_s():
    mine, told = [], []
    before = signal.signal(signal.SIGINT, lambda *_: mine.append(1))
    try:
        with told_to_stop(told.append, None):
            send(signal.SIGTERM)
            send(signal.SIGINT)
            assert until(told, 1) == ["SIGTERM"] and mine == []
            send(signal.SIGINT)
            assert mine == [1]
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_signals_stay_the_caller_s():
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def run():
        with told_to_stop(pytest.fail, pytest.fail):
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before]


def test_it_is_told_while_python_runs_no_handler():
    """As in XLA's compiler: the main thread does not come back, others run."""
    threads = []
    at = []

    def tell(number):
        threads.append((number, threading.current_thread()))
        at.append(time.monotonic())

    before = signal.signal(signal.SIGINT, lambda *_: at.append(-1.0))
    try:
        with at_signals(tell):
            timer = threading.Timer(0.1, send, [signal.SIGINT])
            timer.start()
            # One call into C; it lets other threads run, and no handler.
            hashlib.pbkdf2_hmac("sha256", b"x", b"y", 2_000_000)
            back = time.monotonic()
            timer.join()
    finally:
        signal.signal(signal.SIGINT, before)
    ((number, thread),) = threads
    assert number == signal.SIGINT and thread is not threading.main_thread()
    assert 0 < at[0] < back


def test_nohup_stays():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with told_to_stop(pytest.fail, pytest.fail):
            send(signal.SIGHUP)
            time.sleep(0.1)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
