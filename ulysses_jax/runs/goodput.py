"""Where a run's time went, over all its starts: useful steps, and everything else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ulysses_jax.runs.read import Columns
from ulysses_jax.training.phases import PARTS

Event = Mapping[str, Any]

# A wait for the devices longer than this part of a step: they were at work until then.
_BUSY = 0.01
_MOST = 1e11  # of a row, which may come from anywhere


@dataclass(frozen=True)
class Goodput:
    """Seconds from a run's first start to its last sign of life, by what they went to.

    Each is a part of the whole, and no second is in two of them.

    Attributes:
      useful: training steps that count, each once.
      data: devices without work, since their batch was not there.
      checkpoint: training stood still for one.
      validation: the same.
      start: of a process, to its first step; and compiling later.
      lost: all the time of rows that were taken again, or gone back from, and steps
        that were skipped.
      down: between the end of a process and the next one's start.
      other: what is left, such as a trace that is written, or the end of a process.
    """

    useful: float = 0.0
    data: float = 0.0
    checkpoint: float = 0.0
    validation: float = 0.0
    start: float = 0.0
    lost: float = 0.0
    down: float = 0.0
    other: float = 0.0

    def whole(self) -> float:
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def goodput(columns: Columns, events: Sequence[Event]) -> Goodput | None:
    """Reckons it from a run's rows and events.

    A row has all the time since the one before, and that of a validation and a save of
    its own step. Rows of older runs have not: of those the time between two is taken
    for what the second says, and for what the events say. Rows without `unix_seconds`,
    of before there were events, are left out, and so is their time. A process that was
    killed ends with its last row or event: the rows that the next one took again are no
    longer there, but its `lost_seconds` are.

    A wait for a batch is `data` only where no wait for the devices came after it:
    else they were still at the step before, and lost nothing.

    Args:
      columns: with `unix_seconds`, when each row was logged, and `seconds`, which are
        those of its step.
      events: in the order in which they were written.

    Returns:
      None where nothing says when the run started.
    """
    starts = [at for at, event in enumerate(events) if event["event"] == "started"]
    if not starts or "unix_seconds" not in columns:
        return None
    rows = _by_time(columns)
    ends = [*starts[1:], len(events)]
    sessions = [events[a:b] for a, b in zip(starts, ends, strict=True)]
    begins = [*(each[0]["unix_seconds"] for each in sessions), float("inf")]
    parts = Goodput().parts()
    ended = begins[0]
    for n, session in enumerate(sessions):
        begin, next_begin = begins[n], begins[n + 1]
        parts["down"] += max(0.0, begin - ended)
        times = rows["unix_seconds"]
        first, last = np.searchsorted(times, [begin, next_begin])
        own = {name: column[first:last] for name, column in rows.items()}
        resumed = sessions[n + 1][0] if n + 1 < len(sessions) else None
        ended = min(_end(own, session, resumed), next_begin)
        lost = 0.0 if resumed is None else resumed.get("lost_seconds", 0.0)
        lost = min(lost, ended - begin)
        for name, seconds in _of_session(own, session, begin, ended - lost).items():
            parts[name] += seconds
        parts["lost"] += lost
    return Goodput(**parts)


def _by_time(columns: Columns) -> Columns:
    """The rows whose time is known; what a row does not have is 0."""
    times = columns["unix_seconds"]
    order = np.argsort(times)  # NaN last
    order = order[: np.count_nonzero(np.isfinite(times))]
    names = ("step", "skipped", "seconds", *(f"{part}_seconds" for part in PARTS))
    none = np.full(len(times), np.nan)
    found = {
        name: np.clip(np.nan_to_num(columns.get(name, none)[order]), 0, _MOST)
        for name in names
    }
    validated = np.isfinite(columns.get("validation_loss", none)[order])
    whole = np.isfinite(columns.get("other_seconds", none)[order])
    return found | {
        "unix_seconds": times[order],
        "validated": validated,
        "whole": whole,
    }


def _is_whole(rows: Columns) -> bool:
    """Whether these, of one process, have all the time between them."""
    return bool(rows["whole"].all())


def _end(rows: Columns, session: Sequence[Event], resumed: Event | None) -> float:
    """The last sign of a process: a row, an event, or a row that is no longer there,
    since the next process, which resumed, took its step again."""
    signs = [event["unix_seconds"] for event in session]
    last = [float(at) for at in rows["unix_seconds"][-1:]]
    if last and _is_whole(rows):
        last = [last[0] + _after_it(rows, session)]
    if resumed is None:
        return max(signs + last)
    # Those rows came one after another, after the last that is there and its save.
    first = last or [
        event["unix_seconds"]
        for event in [session[0], *_of_kind(session, "compiled")][:2]
    ]
    if not _is_whole(rows):
        first += [
            event["unix_seconds"]
            for event in _of_kind(session, "saved")
            if event["step"] <= resumed["step"]
        ]
    return max(*signs, max(first) + resumed.get("lost_seconds", 0.0))


def _after_it(rows: Columns, session: Sequence[Event]) -> float:
    """Seconds of the last row, of a process's, that passed after it was logged: not
    those of a validation that the start made up before its first row."""
    saved, validated = rows["checkpoint_seconds"][-1], rows["validation_seconds"][-1]
    both = float(saved + validated)
    has_its_own = (
        len(rows["step"]) > 1
        or rows["validated"][-1]
        or session[-1]["unix_seconds"] >= rows["unix_seconds"][-1] + both
    )
    return both if has_its_own else float(saved)


def _of_kind(events: Sequence[Event], kind: str) -> list[Event]:
    return [event for event in events if event["event"] == kind]


def _of_session(
    rows: Columns, events: Sequence[Event], begin: float, end: float
) -> dict[str, float]:
    """What one process did from `begin` to `end`, but for rows that are gone."""
    logged, seconds = rows["unix_seconds"], rows["seconds"]
    if not len(logged):
        return {"start": end - begin}
    if _is_whole(rows):
        checkpoint, validation = rows["checkpoint_seconds"], rows["validation_seconds"]
        own = sum(rows[f"{part}_seconds"] for part in PARTS) - checkpoint - validation
        inside = np.minimum(seconds, own)
        between = own - inside
        after_it = _after_it(rows, events)
    else:
        inside, between, checkpoint, validation = _of_older(rows, events, begin, end)
        after_it = checkpoint[-1] + validation[-1]
    began = logged - inside
    undone = _gone_back(events, rows["step"])
    skipped = ~undone & (rows["skipped"] > 0)
    compiling = np.minimum(_compiling(events, began, logged), inside)
    idle = rows["compute_seconds"] <= _BUSY * seconds
    steps = inside - compiling
    data = np.where(idle, np.minimum(rows["data_seconds"], steps), 0.0)
    counts = ~undone & ~skipped
    whole = inside + between + checkpoint + validation
    parts = {
        "useful": (steps - data)[counts],
        "data": data[counts],
        "checkpoint": checkpoint[~undone],
        "validation": validation[~undone],
        "start": compiling[~undone],
        "lost": np.append(whole[undone], steps[skipped]),
        "other": between[~undone],
    }
    sums = {name: float(np.sum(each)) for name, each in parts.items()}
    after = max(0.0, end - float(logged[-1] + after_it))
    sums["other"] += after
    sums["start"] += end - begin - after - float(np.sum(whole))
    return sums


def _of_older(
    rows: Columns, events: Sequence[Event], begin: float, end: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of rows that do not say all: the seconds of each one's step, of nothing known
    before it, and of a save and of a validation after it."""
    logged = rows["unix_seconds"]
    before = np.concatenate([[begin], logged[:-1]])
    began = np.maximum(before, logged - rows["seconds"])
    after = np.append((began - before)[1:], max(0.0, end - logged[-1]))
    checkpoint = np.append(rows["checkpoint_seconds"][1:], 0.0)  # those of the next row
    saved = _of_kind(events, "saved")
    if saved and (at := saved[-1]["unix_seconds"]) > logged[-1]:
        checkpoint[-1] = saved[-1].get("seconds", 0.0)
        if events[-1]["event"] in ("done", "stopped"):  # it was waited for
            checkpoint[-1] += max(0.0, end - at)
    for event in _of_kind(events, "rolled_back"):  # all of it is the way back
        if (step := np.searchsorted(logged, event["unix_seconds"]) - 1) >= 0:
            checkpoint[step] = after[step]
    checkpoint = np.minimum(checkpoint, after)
    rest = after - checkpoint
    validation = np.where(rows["validated"], rest, 0.0)
    return (
        logged - began,
        np.append(0.0, (rest - validation)[:-1]),
        checkpoint,
        validation,
    )


def _gone_back(events: Sequence[Event], steps: np.ndarray) -> np.ndarray:
    """Of each row: whether the run went back to a checkpoint before its step."""
    undone = np.zeros(len(steps), bool)
    for event in _of_kind(events, "rolled_back"):
        after = event.get("to_step", event["step"])
        undone |= (steps > after) & (steps <= event["step"])
    return undone


def _compiling(
    events: Sequence[Event], began: np.ndarray, logged: np.ndarray
) -> np.ndarray:
    """Seconds of each row in which a step was compiled.

    An event that says so later than it was, of a step compiled before the first, is in
    the time of no row as a whole.
    """
    seconds = np.zeros(len(logged))
    for event in _of_kind(events, "compiled"):
        ended, took = event["unix_seconds"], event.get("seconds", 0.0)
        row = int(np.searchsorted(logged, ended))
        if row < len(logged) and ended - took >= began[row]:
            seconds[row] += took
    return seconds
