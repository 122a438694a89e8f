"""Events of a run on its page: in words, as a table, and as marks."""

import json
from collections.abc import Sequence
from statistics import median
from typing import Any

from ulysses_jax.runs.read import Event, Run
from ulysses_jax.runs.text import clock, duration, escaped, gib, named, table

_MOST_EVENTS = 200  # of a run, on the page: the newest

# Marks in the first chart: what each looks like around its place, and what it is.
MARKS = {
    "resumed": ("M0,-5A5,5 0 1 1 -4.9,1M-8,-2L-4.9,1.5L-1.6,-1", "resumed"),
    "skipped": ("M-4,-4L4,4M-4,4L4,-4", "step skipped"),
    "spike": ("M0,-5L5,4L-5,4Z", "spike"),
    "rolled_back": ("M-5,0L4,-5L4,5Z", "rolled back"),
}


def kind_of_mark(event: Event) -> str | None:
    kind = event["event"]
    if kind == "started":
        return "resumed" if event["step"] else None
    return kind if kind in MARKS else None


def _is_listed(event: Event) -> bool:
    return event["event"] not in ("saved", "committed", "rows")  # of which are many


def shown_events(run: Run) -> list[Event]:
    """The newest of those that are listed, and of the saves that were lost."""
    return _listed(run)[-_MOST_EVENTS:]


def _listed(run: Run) -> list[Event]:
    lost = {id(event) for event in lost_saves(run)}
    return [
        {**event, "event": "save_lost"} if id(event) in lost else event
        for event in run.events or ()
        if _is_listed(event) or id(event) in lost
    ]


def lost_saves(run: Run) -> list[Event]:
    """Those that began and were never whole on disk: neither did the run say so, nor
    did it go on from there. Of runs that say nothing of it, none."""
    under_way: dict[int, Event] = {}
    lost: list[Event] = []
    for event in run.events or ():
        kind, step = event["event"], event["step"]
        if kind == "saved" and "bytes" in event:
            under_way[step] = event
        elif kind == "committed":
            under_way.pop(step, None)
        elif kind == "started":
            under_way.pop(step, None)
            lost += under_way.values()
            under_way = {}
    return lost if run.goes_on else [*lost, *under_way.values()]


def of_kind(run: Run, kind: str) -> list[Event]:
    return [event for event in run.events or () if event["event"] == kind]


def last_event(run: Run, kind: str) -> Event | None:
    return (of_kind(run, kind) or [None])[-1]


def in_words(event: Event) -> str:
    """An event in words: those known, and the fields of any other as they stand."""
    kind = event["event"]
    fields = {
        name: value
        for name, value in event.items()
        if name not in ("event", "step", "unix_seconds")
    }
    words = kind.replace("_", " ")
    if kind == "started":
        words = "resumed" if event["step"] else "started"
        devices, device = fields.pop("num_devices", None), fields.pop("device_kind", "")
        if devices is not None:
            words += f" on {devices} {device}".rstrip()
        processes = fields.pop("num_processes", 1)
        if processes != 1:
            words += f", {processes} processes"
        steps, seconds = fields.pop("lost_steps", 0), fields.pop("lost_seconds", 0.0)
        if steps:
            words += f"; {steps:,} steps are taken again ({duration(seconds)})"
    elif kind == "compiled" and "seconds" in fields:
        tokens = fields.pop("sequence_tokens", None)
        words += "" if tokens is None else f" the step for rows of {tokens:,} tokens"
        words += f" in {duration(fields.pop('seconds'))}"
    elif kind == "save_lost":
        words = "a checkpoint was begun, and never whole on disk"
        fields = {}
    elif kind == "rolled_back" and "to_step" in fields:
        words += f" to step {fields.pop('to_step'):,}"
    named = {"told": "signal", "profiled": "folder"}.get(kind, "why")
    if named in fields:
        words += f": {fields.pop(named)}"
    peaks = fields.pop("device_peak_bytes", None)
    if isinstance(peaks, list) and peaks and all(type(n) is int for n in peaks):
        words += f"; devices held at most {gib(min(peaks))} to {gib(max(peaks))}"
    rest = "; ".join(f"{name} {_short(value)}" for name, value in fields.items())
    return f"{words}; {rest}" if rest else words


def _how_long(committed: Sequence[Event]) -> str:
    if not committed:
        return ""
    seconds = median(each.get("seconds", 0.0) for each in committed)
    return (
        f"; whole on disk: {len(committed):,}, after {duration(seconds)} each (median)"
    )


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list) and len(value) > 8:
        return f"{json.dumps(value[:8])[:-1]}, ... {len(value):,} in all]"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 2000 else f"{text[:2000]} ..."


def events_of(runs: Sequence[Run]) -> str:
    rows = [
        (
            event["unix_seconds"],
            [clock(event["unix_seconds"]), named(number, run)]
            + [f"{event['step']:,}", in_words(event)],
        )
        for number, run in enumerate(runs)
        for event in shown_events(run)
    ]
    rows.sort(key=lambda row: row[0])
    notes = []
    for run in runs:
        if run.events is None:
            notes.append(
                f"{run.name} has no events.jsonl: when it was stopped and "
                "resumed is not known."
            )
            continue
        older = len(_listed(run)) - _MOST_EVENTS
        if older > 0:
            notes.append(f"{older:,} older ones of {run.name} are not shown.")
        if saved := of_kind(run, "saved"):
            notes.append(
                f"checkpoints that {run.name} began: {len(saved):,}, the last at step "
                f"{saved[-1]['step']:,}" + _how_long(of_kind(run, "committed"))
            )
    said = "".join(f'<p class="faint">{escaped(note)}</p>' for note in notes)
    if not rows:
        return f"<h2>Events</h2>{said}" if said else ""
    shown = table(["time", "run", "step", "what"], [row for _, row in rows], "events")
    return f"<h2>Events</h2>{shown}{said}"
