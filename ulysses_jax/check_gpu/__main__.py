"""`python -m ulysses_jax.check_gpu`: are the kernels true and fast on this GPU?

Every kernel beside float64, its time beside the card's matrix products, a train step as
planned beside as measured. On a machine without a GPU all of it runs at tiny shapes.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from ulysses_jax.check_gpu.measure import UNTIL, NoMachine, measure, write_whole
from ulysses_jax.check_gpu.tables import markdown, page_with

PROGRAM = "python -m ulysses_jax.check_gpu"
PAGE = Path(__file__).parents[2] / "docs" / "measured.md"


def main(argv: list[str]) -> int:
    """0: all that was measured is as it must be; 1: a row fails; 2: it cannot start."""
    own = _parser().parse_args(argv)
    tables = tuple(own.tables.split(","))
    try:
        if unknown := set(tables) - set(UNTIL):
            raise ValueError(
                f"--tables {', '.join(sorted(unknown))}: there are {', '.join(UNTIL)}"
            )
        if not 0 < own.minutes < math.inf:
            raise ValueError(f"--minutes {own.minutes}: give a positive number")
        if own.write_docs:
            page_with(PAGE, "")  # before minutes are spent
        write_whole(own.json, "{}\n")
        results = measure(
            tables=tables,
            minutes=own.minutes,
            quick=own.quick,
            keep=lambda results, i: _keep(own.json, results, i),
        )
        text = markdown(results)
        print(text)
        if own.write_docs and results["quick"]:
            print(f"{PAGE} stays as it is: these shapes are tiny", file=sys.stderr)
        elif own.write_docs:
            write_whole(PAGE, page_with(PAGE, text))
    except (ValueError, OSError, NoMachine) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    return int(any(row["status"] == "FAIL" for row in results["rows"]))


def _keep(path: Path, results: dict[str, Any], i: int | None) -> None:
    write_whole(path, json.dumps(results, indent=1) + "\n")
    if i is None:
        return
    row = results["rows"][i]
    if row["status"] != "skipped":
        columns = (
            f"{x:.3g}" if isinstance(x, float) else str(x)
            for name, x in row.items()
            if name not in ("status", "why") and not isinstance(x, list)
        )
        line = f"{row['status']:4} {' '.join(columns)} {row.get('why', '')}"
        print(line.rstrip(), file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=(__doc__ or "").split("\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--json",
        metavar="FILE",
        type=Path,
        default=Path("measured.json"),
        help="results, written anew after every row; default: measured.json",
    )
    add("--write-docs", action="store_true", help="the tables into docs/measured.md")
    add("--minutes", type=float, default=8, help="in which it ends; default: 8")
    add("--quick", action="store_true", help="tiny shapes, as without a GPU")
    add(
        "--tables",
        metavar="NAME,...",
        default=",".join(UNTIL),
        help=f"default: {','.join(UNTIL)}",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
