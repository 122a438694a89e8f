"""One place for all processes, however far one is ahead of another."""

import random
import threading
import time
from types import SimpleNamespace

import jax
import pytest

from ulysses_jax.training import together
from ulysses_jax.training.together import Together

NUM = 3


@pytest.fixture
def pod(monkeypatch):
    """Threads as processes, with one store; a loop of each, one thread after another
    as processes count their own."""
    keys, here = {}, threading.local()

    def get_all(folder):
        found = {k: v for k, v in list(keys.items()) if k.startswith(f"{folder}/")}
        return {int(key.rsplit("/", 1)[1]): value for key, value in found.items()}

    class Store(SimpleNamespace):
        @staticmethod
        def this_process():
            # A Together's thread is named as its process.
            return getattr(here, "number", None) or int(
                threading.current_thread().name.rsplit("-", 1)[-1]
            )

    monkeypatch.setattr(
        together,
        "store",
        Store(
            set_once=lambda key, value: keys.setdefault(key, value) is value,
            get=keys.get,
            get_all=get_all,
        ),
    )
    monkeypatch.setattr(together, "_POLL_SECONDS", 0.002)
    monkeypatch.setattr(jax, "process_count", lambda: NUM)
    return here


def run(pod, num_programs, asks, *, slow=0.002):
    """What each process did, and after how many programs.

    Args:
      asks: by process and program, what it asks for before that program.
    """
    loops = [Together() for _ in range(NUM)]
    met = [[] for _ in range(NUM)]

    def process(number, loop):
        pod.number = number
        loop._looking.name = f"looks-{number}"
        draw = random.Random(number)
        with loop:
            for program in range(num_programs):
                if act := asks.get((number, program)):
                    loop.ask(act)
                while act := loop.before_a_program():
                    met[number].append((program, act))
                    if act == "stop":
                        return
                time.sleep(draw.random() * slow * (number + 1))

    threads = [
        threading.Thread(target=process, args=each, name=f"process-{each[0]}")
        for each in enumerate(loops)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return met


@pytest.fixture
def alike(monkeypatch):
    """Threads share what processes count alone."""
    numbers = (n // NUM for n in range(10**6))
    monkeypatch.setattr(together, "_LOOPS", numbers)


@pytest.mark.parametrize("asker", range(NUM))
def test_all_stop_at_one_place(pod, alike, asker):
    met = run(pod, 100, {(asker, 20): "stop"})
    assert met[0] == met[1] == met[2]
    ((place, act),) = met[0]
    assert act == "stop" and 20 <= place < 100


def test_they_save_and_go_on_and_stop(pod, alike):
    asks = {(0, 10): "save", (0, 60): "save", (1, 61): "save", (2, 120): "stop"}
    met = run(pod, 400, asks)
    assert met[0] == met[1] == met[2]
    acts = [act for _, act in met[0]]
    assert acts[0] == "save" and acts[-1] == "stop" and acts.count("stop") == 1
    assert 3 <= len(acts) <= 4


def test_who_has_ended_keeps_nobody(pod, alike):
    """Asked near the end: some have nothing left to do, and the others go on."""
    for last in range(95, 100):
        met = run(pod, 100, {(2, last): "stop"}, slow=0.0005)
        assert met[0] == met[1] == met[2]


def test_the_next_stage_finds_no_old_place(pod, alike):
    first = run(pod, 60, {(0, 10): "save", (0, 30): "save"})
    assert len(first[0]) == 2
    assert run(pod, 60, {}) == [[], [], []]
    (place, _), *others = run(pod, 60, {(1, 5): "stop"})[2]
    assert not others and place < 60


def test_alone_it_is_at_once():
    loop = Together()
    with loop:
        assert loop.before_a_program() is None
        loop.ask("save")
        loop.ask("stop")
        loop.ask("save")
        assert loop.asked_to_stop()
        assert [loop.before_a_program() for _ in range(3)] == ["save", "stop", None]
