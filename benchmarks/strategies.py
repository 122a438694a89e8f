"""The time of a step by strategy: does spreading a sequence cost more than it must?

    .venv/bin/python benchmarks/strategies.py [--json FILE] [--quick]

Two things are timed, one sequence over 8 simulated CPU devices: the trainer's own step
of a small model, and causal attention alone, forward and backward. The first by every
strategy; the second by those that are an attention (Megatron's costs lie outside), and
by `ringattention` from PyPI, in an environment of its own: `make strategies` makes it.

Everything is set beside the unsharded program: the same step, or the same attention, on
one device in a process of its own. XLA's pool has a thread a core in either process, so
both have the whole machine; 8 devices share it, so what counts is their work together,
and a device that waits for others costs nothing. Programs run in turn, one at a time;
a ratio is the median over rounds of that within a round. All programs of a length must
have computed the same loss, or the same outputs and gradients, or there is no table.
"""

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from side_by_side import Seconds, Worker, median_ratio, time_in_turn

K = 1024
LENGTHS = [2 * K, 4 * K, 8 * K, 16 * K, 32 * K]
QUICK = LENGTHS[:1]
DEVICES = 8
# Narrow heads: attention is most of a step early, and the longest takes seconds.
SHAPE = {"heads": 8, "head_size": 16}
SPREAD = ["ulysses", "ring", "hybrid", "all_gather"]
KINDS = {
    "step": ["unsharded", *SPREAD, "megatron"],
    "attention": ["unsharded", *SPREAD, "ringattention"],
}
HERE = Path(__file__).parent
ENVIRONMENT = HERE.parent / ".venv-ringattention"


def worker(file: str, devices: int, python: str = sys.executable) -> Worker:
    """A process with so many simulated devices, whatever this one's flags say."""
    environment = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "XLA_FLAGS": "",
    }
    return Worker([python, str(HERE / file)], environment)


def measure(
    kind: str, tokens: int, workers: dict[str, Any], *, seconds: float, least: int = 3
) -> list[dict[str, Any]]:
    """The rows of one kind and length.

    Args:
      workers: by strategy, those to time; "unsharded" is among them.
      seconds: that the timed runs should take.
      least: rounds.

    Raises:
      RuntimeError: two programs computed different things.
    """
    asked = {
        name: {
            "kind": kind,
            "strategy": "ulysses" if name == "unsharded" else name,
            "tokens": tokens,
            **SHAPE,
        }
        for name in workers
    }
    norms = {name: workers[name].make(asked[name]) for name in workers}
    for name, found in norms.items():
        expected = norms["unsharded"]
        if not all(map(_nearly, found, expected)):
            raise RuntimeError(
                f"{kind}, {tokens} tokens: {name} computed {found}, but unsharded "
                f"{expected}"
            )
    runs = {name: _run(workers[name], asked[name]) for name in workers}
    times = time_in_turn(runs, seconds=seconds, least=least, most=15)
    for each in workers.values():
        each.drop()
    return [
        {
            "kind": kind,
            "strategy": name,
            "tokens": tokens,
            "seconds": statistics.median(each.passed for each in found),
            "ratio_to_unsharded": _ratio(found, times["unsharded"]),
            "ratio_to_ulysses": _ratio(found, times["ulysses"]),
            "busy_ratio_to_unsharded": _ratio(found, times["unsharded"], busy=True),
            "rounds": len(found),
        }
        for name, found in times.items()
    ]


def _run(worker: Any, description: dict[str, Any]):
    return lambda: worker.run(description)


def _nearly(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-4)


def _ratio(times: list[Seconds], to: list[Seconds], *, busy: bool = False) -> float:
    return median_ratio([x[busy] for x in times], [x[busy] for x in to])


def all_rows(
    lengths: list[int], ringattention: Path | None, seconds: float
) -> Iterator[dict[str, Any]]:
    """Every row, as it is measured; `ringattention` is the Python that has it."""
    with ExitStack() as stack:
        one = stack.enter_context(worker("strategies_worker.py", 1))
        spread = stack.enter_context(worker("strategies_worker.py", DEVICES))
        workers = {"unsharded": one} | dict.fromkeys([*SPREAD, "megatron"], spread)
        if ringattention:
            workers["ringattention"] = stack.enter_context(
                worker("ringattention_worker.py", DEVICES, str(ringattention))
            )
        for kind, strategies in KINDS.items():
            chosen = {name: workers[name] for name in strategies if name in workers}
            for tokens in lengths:
                yield from measure(kind, tokens, chosen, seconds=seconds)


def print_table(rows: list[dict[str, Any]], lengths: list[int]) -> None:
    title = f"seconds / unsharded (processors' time / unsharded's), {DEVICES} devices"
    table = Table(title=title, box=None)
    table.add_column("timed")
    table.add_column("strategy")
    for tokens in lengths:
        table.add_column(f"{tokens // K}K", justify="right")
    for kind, strategies in KINDS.items():
        for name in strategies:
            found = {
                each["tokens"]: each
                for each in rows
                if (each["kind"], each["strategy"]) == (kind, name)
            }
            cells = [
                f"{each['seconds']:.3f} / {each['ratio_to_unsharded']:.2f} "
                f"({each['busy_ratio_to_unsharded']:.2f})"
                for each in (found[tokens] for tokens in lengths if found)
            ]
            table.add_row(kind, name, *(cells or ["-"] * len(lengths)))
    Console(width=150, highlight=False).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="2K tokens")
    args = parser.parse_args()
    lengths = QUICK if args.quick else LENGTHS
    console = Console(stderr=True, highlight=False)
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        console.print(
            f"ringattention is LEFT OUT: {ENVIRONMENT.name} is missing. To make it:\n"
            f"    python3 -m venv {ENVIRONMENT.name}\n"
            f"    {ENVIRONMENT.name}/bin/python -m pip install "
            "--requirement benchmarks/ringattention.txt"
        )
        python = None
    load = os.getloadavg()[0]
    if load > 0.5:
        console.print(
            f"this machine is NOT IDLE (load {load:.1f}): others take time from "
            "programs unequally; trust the ratios of the processors' time"
        )
    rows = []
    for row in all_rows(lengths, python, 3 if args.quick else 30):
        rows.append(row)
        console.print(
            f"{row['kind']} {row['tokens']} {row['strategy']}: "
            f"{row['seconds']:.3f} s, {row['ratio_to_unsharded']:.2f}"
        )
    print_table(rows, lengths)
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "load": load}, indent=1))


if __name__ == "__main__":
    main()
