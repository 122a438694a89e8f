"""What the processes of a run do at one place in it: they save, and they stop."""

import itertools
import threading
from types import TracebackType
from typing import Any, Literal

import jax

from ulysses_jax.training import store

Act = Literal["save", "stop"]
_POLL_SECONDS = 0.5
_KEYS = "ulysses_jax/together"
_LOOPS = itertools.count()  # of this process; the others count alike


class Together:
    """Finds the place where all processes do what one of them asks for.

    Programs with collectives are dispatched in the same order everywhere, and a process
    may be some of them ahead of another. When one asks, all say how many they have
    dispatched and hold; the largest number is the place: who is behind goes on to it.
    Alone, a process acts before its next program. A context manager, of one loop.

    Costs: on a pod a look into the store of keys twice a second, in a thread.
    """

    def __init__(self) -> None:
        self._many = jax.process_count() > 1
        self._keys = f"{_KEYS}/{next(_LOOPS)}"  # a stage's are not the next one's
        self._change = threading.Condition()
        self._asked: list[Act] = []  # here, and not yet by a round
        self._dispatched = 0
        self._holds = False  # this process has said where it is
        self._place: int | None = None
        self._act: Any = None
        self._round = 0
        self._ended = threading.Event()
        self._looking = threading.Thread(target=self._look, daemon=True)

    def ask(self, act: Act) -> None:
        """For all processes to do, soon; from any thread. Asked twice is asked once."""
        with self._change:
            if act not in self._asked:
                self._asked.append(act)

    def asked_to_stop(self) -> bool:
        """Whether this process has asked to stop, and has not yet."""
        return "stop" in self._asked

    def before_a_program(self) -> Act | None:
        """To be called before each dispatch of a program that all processes run.

        Returns:
          None: dispatch it. Else what to do first, at the same call in every process;
          then call again.
        """
        with self._change:
            if not self._many:
                if self._asked:
                    return self._asked.pop(0)
                return None
            self._change.wait_for(lambda: not self._holds or self._place is not None)
            if self._place == self._dispatched:
                act, self._act, self._place = self._act, None, None
                self._holds = False
                self._round += 1
                if act in self._asked:
                    self._asked.remove(act)
                return act
            self._dispatched += 1
            return None

    def _look(self) -> None:
        while not self._ended.wait(_POLL_SECONDS):
            with self._change:
                here, asked = f"{self._keys}/{self._round}", self._asked[:1]
                if self._place is not None:
                    continue  # it goes there
            for act in asked:
                store.set_once(f"{here}/act", act)
            if (act := store.get(f"{here}/act")) is None:
                continue
            with self._change:
                if not self._holds:
                    self._holds, self._act = True, act
                    self._say_where()
            places = store.get_all(f"{here}/at")
            if len(places) == jax.process_count():
                with self._change:
                    self._place = max(map(int, places.values()))
                    self._change.notify_all()

    def _say_where(self) -> None:
        key = f"{self._keys}/{self._round}/at/{store.this_process()}"
        store.set_once(key, f"{self._dispatched}")

    def __enter__(self) -> "Together":
        if self._many:
            self._looking.start()
        return self

    def __exit__(
        self, kind: Any, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._many:
            self._ended.set()
            self._looking.join()
            # Who is behind need not wait for this process: that goes on to the end.
            self._say_where()
