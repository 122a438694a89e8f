"""A page of runs: `python -m ulysses_jax.runs FOLDER...`."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ulysses_jax.runs.page import BEGINS, page
from ulysses_jax.runs.read import read_runs
from ulysses_jax.training.endings import ends_in_words
from ulysses_jax.training.output import print_every_name

PROGRAM = "python -m ulysses_jax.runs"
# Of the time that --follow takes, what it reads and writes may take.
_AT_WORK = 0.2
_SECONDS = 10.0


def main(argv: Sequence[str] | None = None) -> None:
    """Raises SystemExit: with code 2 for an error in words, 130 for Ctrl-C."""
    options = _parser().parse_args(argv)
    with ends_in_words(PROGRAM), print_every_name():
        if options.seconds is not None and not options.follow:
            raise ValueError(
                f"--seconds {options.seconds:g} is of --follow: give both, or neither"
            )
        seconds = _SECONDS if options.seconds is None else options.seconds
        try:
            _write_pages(
                [Path(each) for each in options.folders],
                Path(options.output),
                seconds if options.follow else None,
            )
        except KeyboardInterrupt:
            sys.exit(130)


def _write_pages(folders: list[Path], output: Path, every: float | None) -> None:
    """The page, once; or every so many seconds, until no run goes on."""
    if every is not None and not every > 0:
        raise ValueError(f"--seconds {every:g}: give more than 0")
    _refuse_output(output)
    is_first = True
    while True:
        started = time.monotonic()
        runs = read_runs(folders)
        if is_first and not any(run.num_rows() for run in runs):
            names = ", ".join(map(str, folders))
            raise ValueError(f"{names}: no step was taken yet: wait for the first")
        wait = None
        if every is not None and any(run.goes_on for run in runs):
            took = time.monotonic() - started
            wait = max(every, took * (1 - _AT_WORK) / _AT_WORK)
        _write(output, page(runs, refresh_seconds=wait))
        if is_first:
            rest = "" if wait is None else ", written again while runs go on"
            print(f"{output.absolute().as_uri()}{rest}", flush=True)
        if wait is None:
            return
        is_first = False
        time.sleep(wait)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Writes one HTML page of runs, beside each other: it opens in any "
        "browser and needs no network.",
        allow_abbrev=False,
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="runs/tiny")
    parser.add_argument(
        "--output", default="runs.html", metavar="FILE", help="default: runs.html"
    )
    parser.add_argument(
        "--follow",
        action="store_true",
        help="write the page again and again until all runs have ended; where it is "
        "open, it loads itself again",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="N",
        help=f"between two writes of --follow; default: {_SECONDS:g}",
    )
    return parser


def _refuse_output(path: Path) -> None:
    if not path.parent.is_dir():
        raise ValueError(
            f"--output {path}: there is no folder {path.parent}: make it, or choose "
            "another file"
        )
    if path.is_dir():
        raise ValueError(
            f"--output {path} is a folder: give a file, such as {path / 'runs.html'}"
        )
    if path.exists():
        with open(path, "rb") as file:
            if file.read(len(BEGINS)) != BEGINS.encode():
                raise ValueError(
                    f"{path} is there and no page of this program: choose another "
                    "--output, or remove it"
                )


def _write(path: Path, text: str) -> None:
    """By rename, so that a browser never reads half a page."""
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        new.write_text(text)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
