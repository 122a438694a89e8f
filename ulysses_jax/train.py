"""The trainer as a program: its command line, how it ends, and a pod's processes.

    python -m ulysses_jax.train --config my.yaml [--SECTION.FIELD VALUE ...]

`train.py` in a checkout is another door to it; from Python there is
`ulysses_jax.training.train`. Nothing that takes time is imported before Ctrl-C has its
handler: so this file imports inside its functions.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

_M_ARENA_MAX = -8  # of malloc.h


def start(program: str) -> None:
    """Runs what the command line says.

    Args:
      program: how the user calls it; its messages begin so.
    """
    interrupted = partial(_interrupted, program)
    signal.signal(signal.SIGINT, interrupted)
    _fewer_arenas()
    from ulysses_jax.training.endings import as_program, with_the_others

    interrupted = with_the_others(interrupted)
    with as_program(interrupted):
        main(sys.argv[1:], program=program, interrupted=interrupted)


def _fewer_arenas() -> None:
    """Has glibc deal threads over one arena a core, in place of eight.

    Each save has new threads, and each arena that they come to keeps the most that was
    ever needed of it. It counts for arenas that are made after it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    of_the_user = "MALLOC_ARENA_MAX" in os.environ or (
        "arena_max" in os.environ.get("GLIBC_TUNABLES", "")
    )
    if mallopt is not None and not of_the_user:
        mallopt(_M_ARENA_MAX, os.cpu_count() or 1)


def _interrupted(program: str, *_) -> None:
    """Ctrl-C before the first step, or a second one. An exception might be lost."""
    try:
        if os.isatty(1):
            os.write(1, b"\x1b[?25h\n")  # the cursor, which the bar hides
        line = f"{program}: interrupted; the same command goes on from the last "
        os.write(2, f"{line}checkpoint, if there is one\n".encode())
    finally:
        os._exit(130)


def main(
    argv: list[str],
    *,
    program: str = "train.py",
    interrupted: Callable[[], Any] | None = None,
) -> None:
    """`start`, in a process that may go on.

    Raises:
      SystemExit: with code 2 for an error in words, 130 where it was told to stop.
    """
    import dataclasses

    from ulysses_jax.config_file import load_from_command_line
    from ulysses_jax.distributed import start_distributed
    from ulysses_jax.models.kinds import refuse_unknown
    from ulysses_jax.training import train_stages
    from ulysses_jax.training.alike import refuse_others
    from ulysses_jax.training.endings import ends_in_words, ends_with_the_others, stop
    from ulysses_jax.training.signals import Stopped

    with ends_in_words(program):
        stages = load_from_command_line(argv, program=program)
        for stage in stages:  # before a pod's processes wait for each other
            refuse_unknown(stage.model.kinds())
        start_distributed(**dataclasses.asdict(stages[0].distributed))
        with ends_with_the_others():
            refuse_others(stages)
            try:
                train_stages(stages, interrupted=interrupted)
            except Stopped:
                stop(130, "it was told to stop")


if __name__ == "__main__":
    start("python -m ulysses_jax.train")
