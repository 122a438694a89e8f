"""Programs in processes of their own, timed in turn, so that noise meets all alike.

A worker is a Python file that calls `serve`; the benchmark holds a `Worker` for each.
Compiled programs stay in their worker, and wait there while another's turn is timed.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

# Runs once, to the end, and returns arrays that prove what it computed.
Program = Callable[[], list[Any]]


class Seconds(NamedTuple):
    """Of one run."""

    passed: float
    busy: float
    """Of all processors together, in the program's process."""


def serve(make: Callable[[dict[str, Any]], Program]) -> None:
    """Answers requests until there are no more; called by a worker.

    Args:
      make: compiles the program that a request describes.

    A request is a line of JSON. `{"make": {...}}` compiles a program, runs it once, and
    answers with the norms of what it returned. `{"run": {...}}` runs one that was made
    and answers with its seconds, and those of all processors together. `{"drop": true}`
    forgets all programs.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever libraries print
    programs: dict[str, Program] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "make" in request:
            program = programs[json.dumps(request["make"])] = make(request["make"])
            answer: Any = [float(np.linalg.norm(np.ravel(x))) for x in program()]
        elif "run" in request:
            program = programs[json.dumps(request["run"])]
            started = time.perf_counter(), time.process_time()
            program()
            ended = time.perf_counter(), time.process_time()
            answer = [ended[0] - started[0], ended[1] - started[1]]
        else:
            programs.clear()
            answer = None
        print(json.dumps(answer), file=answers, flush=True)


class Worker:
    """A process that runs `serve`; use it as a context."""

    def __init__(self, command: list[str], environment: dict[str, str] | None = None):
        """Starts `command`, with `environment` beside this process's own."""
        self.command = command
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | (environment or {}),
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self.process.communicate()  # no more requests: it ends

    def make(self, description: dict[str, Any]) -> list[float]:
        """Compiles a program and runs it once; returns the norms of its results."""
        return self._ask("make", description)

    def run(self, description: dict[str, Any]) -> Seconds:
        """Times one run of a program that was made."""
        return Seconds(*self._ask("run", description))

    def drop(self) -> None:
        """Forgets its programs."""
        self._ask("drop", True)

    def _ask(self, what: str, value: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        try:
            print(json.dumps({what: value}), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = self.process.wait()
            raise RuntimeError(f"{self.command} ended with {code} at {what} {value}")
        return json.loads(answer)


def time_in_turn(
    programs: dict[str, Callable[[], Seconds]], *, seconds: float, least: int, most: int
) -> dict[str, list[Seconds]]:
    """Times each program once a round.

    Args:
      programs: each runs once.
      seconds: that all rounds together should take; the first round says how many.
      least, most: rounds. Every round begins one program later than the one before.

    Returns:
      The seconds of each program, round by round.
    """
    names, rounds = list(programs), most
    times: dict[str, list[Seconds]] = {name: [] for name in names}
    done = 0
    while done < rounds:
        first = done % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(programs[name]())
        done += 1
        if done == 1:
            took = sum(each[0].passed for each in times.values())
            rounds = min(max(round(seconds / took), least), most)
    return times


def median_ratio(times: list[float], to: list[float]) -> float:
    """The median over rounds of the ratio within a round: slow rounds cancel out."""
    return statistics.median(a / b for a, b in zip(times, to, strict=True))
