"""A run's folder as a record: its rows as columns, its events, its config, its end."""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from ulysses_jax.config_file import read_values
from ulysses_jax.outside import objects_in_lines
from ulysses_jax.run_folder import check_run_folder, is_run_folder, stages_in
from ulysses_jax.training.lock import was_left
from ulysses_jax.training.metrics import rows_in

# As long as a run waits for a step before it takes it to hang (`training.phases`).
_SILENT_SECONDS, _TIMES_THE_LONGEST = 600.0, 5.0
_ENDS = ("done", "stopped", "failed")
_NUMBERS = ("unix_seconds", "seconds", "lost_seconds", "lost_steps", "to_step")

_ROWS_AT_A_TIME = 20_000

Columns = Mapping[str, np.ndarray]
Event = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """What a run's folder says.

    Attributes:
      name: of the folder; with what of its path tells it from the others.
      columns: by field of `metrics.jsonl`, float64 of a row each, NaN where a row does
        not have it; in the order of steps, each step once. `step` is always there.
      events: of `events.jsonl`, in the order in which they were written; None where the
        run has no such file.
      config: of `config.yaml`, by dotted names; `config_text` as it stands there.
      state: how it stands with the run, in words.
      goes_on: whether more rows may come.
    """

    name: str
    folder: Path
    columns: Columns
    events: Sequence[Event] | None
    config: Mapping[str, Any]
    config_text: str
    state: str
    goes_on: bool

    def num_rows(self) -> int:
        return len(self.columns["step"])


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Reads runs; a run in stages as its stages.

    Raises:
      ValueError: a folder is no run's, or stands twice; a config that cannot be read.
    """
    found = [run for each in folders for run in _runs_in(each)]
    seen: set[Path] = set()
    for folder in found:
        real = folder.resolve()
        if real in seen:
            raise ValueError(f"{folder} stands twice: give each run's folder once")
        seen.add(real)
    names = _names([Path(os.path.abspath(each)) for each in found])
    return [_read(*each) for each in zip(found, names, strict=True)]


def columns_of(rows: Sequence[Mapping[str, float]]) -> Columns:
    """Rows as columns; of rows of one step the last."""
    return _each_step_once([_table(rows)])


def _read_columns(path: Path) -> Columns:
    """Of a file, some rows at a time: as objects they take ten times the memory."""
    parts = [_table([])]
    rows = rows_in(path)
    while part := list(islice(rows, _ROWS_AT_A_TIME)):
        parts.append(_table(part))
    return _each_step_once(parts)


def _table(rows: Sequence[Mapping[str, float]]) -> Columns:
    names = dict.fromkeys(name for row in rows for name in row) | {"step": None}
    return {
        name: np.array([row.get(name, np.nan) for row in rows], np.float64)
        for name in names
    }


def _each_step_once(parts: Sequence[Columns]) -> Columns:
    names = dict.fromkeys(name for part in parts for name in part)
    columns = {
        name: np.concatenate(
            [part.get(name, np.full(len(part["step"]), np.nan)) for part in parts]
        )
        for name in names
    }
    # Of the reversed steps `unique` takes the first of each, which is the last written.
    _, kept = np.unique(columns["step"][::-1], return_index=True)
    kept = len(columns["step"]) - 1 - kept
    return {name: column[kept] for name, column in columns.items()}


def _runs_in(folder: Path) -> list[Path]:
    stages = stages_in(folder)
    if stages and not (folder / "metrics.jsonl").is_file():
        return stages
    check_run_folder(folder)
    if not is_run_folder(folder):
        raise ValueError(
            f"{folder} is no run's folder: it has a config.yaml, and neither a "
            "metrics.jsonl nor checkpoints/"
        )
    return [folder]


def _names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path; of those that share it, as much as tells them apart.

    `/r/x/stage_1` alone is `x/stage_1`.
    """

    def tail(path: Path, parts: int) -> str:
        return "/".join(path.parts[-parts:])

    needed = [2 if path.name.startswith("stage_") else 1 for path in paths]
    while True:
        names = [tail(*each) for each in zip(paths, needed, strict=True)]
        same = [names.count(name) > 1 for name in names]
        if not any(same):
            return names
        needed = [n + twice for n, twice in zip(needed, same, strict=True)]


def _read(folder: Path, name: str) -> Run:
    text, config = _config(folder / "config.yaml")
    path = folder / "metrics.jsonl"
    columns = _read_columns(path) if path.is_file() else columns_of([])
    events = _events(folder / "events.jsonl")
    state, goes_on = _state(folder, columns, events, config)
    return Run(name, folder, columns, events, config, text, state, goes_on)


def _config(path: Path) -> tuple[str, dict[str, Any]]:
    fields = read_values(path)
    text = path.read_text()
    if not isinstance(fields, dict) or not fields:
        raise ValueError(f"{path} is no config: it has no sections")
    return text, dict(_flat(fields))


def _flat(fields: Mapping[Any, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _events(path: Path) -> list[Event] | None:
    if not path.is_file():
        return None
    return [value for value in objects_in_lines(path) if _is_event(value)]


def _is_event(value: dict[str, Any]) -> TypeGuard[Event]:
    return (
        isinstance(value.get("event"), str)
        and type(value.get("step")) is int
        and abs(value["step"]) < 2**63
        and "unix_seconds" in value
        and all(_is_number(value[name]) for name in _NUMBERS if name in value)
    )


def _is_number(value: Any) -> bool:
    """As events have them: of this age of the world, and neither NaN nor infinite."""
    return type(value) in (int, float) and 0 <= value < 1e11


def _state(
    folder: Path,
    columns: Columns,
    events: Sequence[Event] | None,
    config: Mapping[str, Any],
) -> tuple[str, bool]:
    """How it stands with a run, in words, and whether it goes on."""
    ended = "ended before its last step"
    steps = columns["step"]
    if len(steps) and steps[-1] == config.get("training.num_steps"):
        ended = "done"
    if events and events[-1]["event"] in _ENDS:
        ended = events[-1]["event"]
    try:
        began = (folder / "lock").stat().st_mtime
        left = was_left(folder / "lock")
    except FileNotFoundError:
        return ended, False
    # It may have begun again after that end, and not yet have said so.
    signs = [np.array([began])]
    signs.append(columns.get("unix_seconds", steps[:0]))
    signs.append(np.array([each["unix_seconds"] for each in events or ()]))
    if "unix_seconds" not in columns and (folder / "metrics.jsonl").is_file():
        signs.append(np.array([(folder / "metrics.jsonl").stat().st_mtime]))
    seconds = columns.get("seconds", steps[:0])
    longest = float(np.nanmax(seconds)) if len(seconds) else 0.0
    silent = time.time() - float(np.nanmax(np.concatenate(signs)))
    if not left and silent <= max(_SILENT_SECONDS, _TIMES_THE_LONGEST * longest):
        return "goes on", True
    if ended in _ENDS:
        return ended, False
    return "ended without a word, as one that is killed", False
