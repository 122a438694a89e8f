"""`python -m ulysses_jax.plan`: what a run will need, before the GPUs are rented.

python -m ulysses_jax.plan --config configs/llama3_8b.yaml --gpus h100:1x8
python -m ulysses_jax.plan --config configs/tiny.yaml --check
"""

import argparse
import dataclasses
import json
import math
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ulysses_jax.config import Config
from ulysses_jax.config_file import load_from_command_line
from ulysses_jax.costs.pairs import Pairs
from ulysses_jax.costs.targets import TARGETS, parse_gpus
from ulysses_jax.data.packing import pack
from ulysses_jax.data.streams import document_ends
from ulysses_jax.plan.check import check
from ulysses_jax.plan.compare import compare
from ulysses_jax.plan.lengths import lengths_on, longest_alone
from ulysses_jax.plan.longest import longest
from ulysses_jax.plan.picture import plot_plan
from ulysses_jax.plan.plan import Cluster, make_plan, with_tokens
from ulysses_jax.plan.report import (
    print_check,
    print_comparison,
    print_plan,
)

PROGRAM = "python -m ulysses_jax.plan"


def main(argv: list[str]) -> None:
    own, rest = _parser().parse_known_args(argv)
    if "-h" in rest or "--help" in rest:
        _parser().print_help()
        sys.exit(0)
    try:
        _run(own, rest)
    except (ValueError, OSError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        sys.exit(2)


def _run(own: argparse.Namespace, rest: list[str]) -> None:
    given = _stage(load_from_command_line(rest, program=PROGRAM), own.stage)
    for path in filter(None, (own.json, own.plot)):
        if not path.absolute().parent.is_dir():
            raise ValueError(
                f"{path}: there is no folder {path.parent}: make it, or give another"
            )
        if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
            raise ValueError(f"{path} cannot be written as a file: give another")
    if not 0 < own.timeout < math.inf:
        raise ValueError(f"--timeout {own.timeout}: give a positive number of seconds")
    if given.data.lengths and (own.longest or own.documents_of_data):
        option = "--longest" if own.longest else "--documents-of-data"
        raise ValueError(
            f"{option} is of rows of one length cut from a stream, and the run has "
            "data.lengths: leave one of them out (--data.lengths without a number)"
        )
    config = longest_alone(given)
    # Written to a file or a pipe, tables keep their width.
    width = None if sys.stdout.isatty() else 120
    console = Console(highlight=False, width=width)
    if own.documents_of_data:
        config = _with_documents_of_data(config)
        tokens = config.data.document_tokens
        console.print(f"documents of {config.data.files}: as if of {tokens:,} tokens")
    if own.check:
        given = ("gpus", "longest", "compare", "plot", "host_memory")
        if extra := [name for name in given if getattr(own, name)]:
            raise ValueError(
                f"--check runs on the devices here: it takes no --{extra[0]}".replace(
                    "_", "-"
                )
            )
        found = check(config)
        print_check(found, console)
        _write(own.json, found)
        if whys := [row["why"] for row in found["rows"] if "why" in row]:
            sys.exit("\n".join(f"{PROGRAM}: {why}" for why in whys))
        return
    if own.gpus is None:
        raise ValueError(
            f"say for which GPUs: --gpus h100:1x8 (hosts x GPUs a host; "
            f"{', '.join(TARGETS)}), or --check on a machine that has the devices"
        )
    cluster = Cluster(
        *parse_gpus(own.gpus),
        host_memory_bytes=own.host_memory and parse_bytes(own.host_memory),
        timeout_seconds=own.timeout,
        use_cache=not own.no_cache,
    )
    # Before anything is compiled: a length may not fit the mesh.
    lengths = lengths_on(given, cluster) if given.data.lengths else []
    with _progress() as progress:
        task = progress.add_task(f"compiling for {cluster.name}")
        if own.longest:

            def show(tokens: int, plan: dict[str, Any]) -> None:
                verb = "fit" if plan["fits"] else "do not fit"
                progress.update(task, description=f"{tokens:,} tokens {verb}")
                if not progress.console.is_terminal:
                    print(f"{tokens:,} tokens {verb}", file=sys.stderr, flush=True)

            plan = longest(config, cluster, on_trial=show)
        else:
            plan = make_plan(config, cluster)
    if lengths:
        plan["lengths"] = lengths
    print_plan(plan, console)
    if own.longest:
        tokens = plan["longest_tokens"]
        console.print(
            f"[bold]The longest sequence that fits: {tokens:,} tokens[/bold] "
            f"({len(plan['trials'])} lengths compiled, known to 1 %)"
        )
    if own.compare:
        with _progress() as progress:
            progress.add_task("compiling the other strategies")
            rows = compare(with_tokens(config, plan["tokens"]), cluster)
        print_comparison(rows, console)
        plan["strategies"] = rows
    if own.plot:
        plot_plan(plan, own.plot)
    _write(own.json, plan)


def _stage(configs: tuple[Config, ...], number: int | None) -> Config:
    """Of a file with stages the one that was asked for."""
    if number is None and len(configs) == 1:
        return configs[0]
    if number is None or not 1 <= number <= len(configs):
        lengths = ", ".join(f"{each.training.sequence_tokens:,}" for each in configs)
        given = "" if number is None else f"--stage {number}: "
        raise ValueError(
            f"{given}the config has {len(configs)} stages, of {lengths} tokens: plan "
            f"one of them, --stage 1 to --stage {len(configs)}"
        )
    return configs[number - 1]


def _with_documents_of_data(config: Config) -> Config:
    """With the mean length at which exponential lengths leave a row as many pairs as
    the data's documents do, as `data.packing` lays them out in rows."""
    if not config.data.mask_documents:
        raise ValueError(
            "--documents-of-data counts what documents do not see of each other, but "
            "data.mask_documents is false: leave one of them out"
        )
    if config.data.mixture:
        raise ValueError(
            "--documents-of-data counts the documents of data.files, and the run has a "
            "data.mixture: say their mean length, --data.document-tokens"
        )
    span, ends = config.training.sequence_tokens, document_ends(config)
    if config.data.packing == "whole":
        packing = pack(np.diff(ends, prepend=0), span)
        sizes, num_rows = packing.last - packing.first, len(packing)
    else:
        rows = np.arange(span, ends[-1], span)
        sizes = np.diff(np.union1d(ends, rows), prepend=0)
        num_rows = ends[-1] / span
    pairs = (sizes.astype(float) ** 2).sum() / 2 / num_rows
    low, high = 1, 2**31 - 1
    while low < high:  # the least mean that leaves as many
        mean = (low + high) // 2
        enough = Pairs((None,), mean).visible(span) >= pairs
        low, high = (low, mean) if enough else (mean + 1, high)
    data = dataclasses.replace(config.data, document_tokens=low)
    return dataclasses.replace(config, data=data)


def parse_bytes(text: str) -> int:
    """Reads "1.9TB", "80GiB" or a plain number of bytes."""
    match = re.fullmatch(r"\s*([\d.]+)\s*(?:([KMGTP])(i?)B?|B)?\s*", text, re.I)
    try:
        number = float(match[1]) if match else math.nan
    except ValueError:
        number = math.nan
    if match is None or not 1 <= number < 1e15:
        raise ValueError(f"--host-memory {text!r}: write it as 1.9TB or 512GiB")
    unit = 1024 if match[3] else 1000
    power = 1 + "KMGTP".index(match[2].upper()) if match[2] else 0
    return int(number * unit**power)


def _write(path: Path | None, value: dict[str, Any]) -> None:
    """Writes JSON whole or not at all."""
    if path is None:
        return
    folder = path.absolute().parent
    with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as part:
        json.dump(value, part, indent=1)
    os.chmod(part.name, 0o644)
    os.replace(part.name, path)


def _progress() -> Progress:
    """On the terminal alone: it goes to stderr and leaves nothing behind."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} --config FILE",
        description=(__doc__ or "").split("\n")[0],
        epilog="Any field of the config can be overridden: --mesh.seq 16 "
        "--training.sequence-tokens 1000000",
        add_help=False,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--gpus", metavar="GPU:HOSTSxGPUS", help=f"a cluster; {', '.join(TARGETS)}")
    add("--stage", metavar="N", type=int, help="of a config with stages, the Nth")
    add("--longest", action="store_true", help="find the longest sequence that fits")
    add("--compare", action="store_true", help="the strategies side by side")
    add("--check", action="store_true", help="planned beside measured, on devices here")
    add(
        "--documents-of-data",
        action="store_true",
        help="count documents as long as those of data.files",
    )
    add("--json", metavar="FILE", type=Path, help="write the plan as JSON")
    add("--plot", metavar="FILE.png", type=Path, help="draw the plan")
    add("--host-memory", metavar="1.9TB", help="of a host; default: the GPU's usual")
    add("--timeout", metavar="SECONDS", type=float, default=900, help="of a compile")
    add("--no-cache", action="store_true", help="compile anew, keep nothing")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
