"""One HTML page of runs: curves, numbers, where the time went, configs, events."""

import base64
import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ulysses_jax.runs.curves import MOST_POINTS, along, curve
from ulysses_jax.runs.goodput import Goodput, goodput
from ulysses_jax.runs.read import Columns, Event, Run

# What a page of this program begins with; another file is not written over.
BEGINS = (
    '<!doctype html><html lang="en"><meta name="generator" content="ulysses_jax.runs">'
)

_HERE = Path(__file__).parent
_NOT_KNOWN = "not known"
_MOST_EVENTS = 200  # of a run, on the page: the newest

_CHARTS = (
    ("loss", "Loss", "nats a token"),
    ("tokens_per_second", "Tokens a second", "of all devices"),
    ("mfu", "MFU", "of the devices' peak, 0 to 1"),
    ("seconds", "Time of a step", "seconds"),
    ("data_seconds", "Waits for data", "seconds a step"),
    ("gradient_norm", "Norm of the gradient", "before clipping"),
    ("learning_rate", "Learning rate", ""),
    ("sequence_tokens", "Length of rows", "tokens"),
    ("objective", "Objective", "what the gradients are of"),
    ("device_peak_bytes", "Memory of a device at its peak", "bytes"),
)

# Marks in the first chart: what each looks like around its place, and what it is.
_MARKS = {
    "resumed": ("M0,-5A5,5 0 1 1 -4.9,1M-8,-2L-4.9,1.5L-1.6,-1", "resumed"),
    "skipped": ("M-4,-4L4,4M-4,4L4,-4", "step skipped"),
    "spike": ("M0,-5L5,4L-5,4Z", "spike"),
    "rolled_back": ("M-5,0L4,-5L4,5Z", "rolled back"),
}

_PARTS = {
    "useful": "useful: steps that count, each once",
    "data": "devices waited for data",
    "checkpoint": "checkpoints",
    "validation": "validation",
    "start": "starts and compiling",
    "lost": "lost: steps taken again, skipped or gone back from",
    "down": "down between two starts",
    "other": "other, such as a process's end",
}


class Html(str):
    """Text that is HTML already; all other text is escaped."""


def page(runs: Sequence[Run], *, refresh_seconds: float | None = None) -> str:
    """The page: whole, in one text, that asks nothing of a network.

    Args:
      refresh_seconds: how often it loads itself again; None: never.
    """
    style, script = ((_HERE / f"page.{end}").read_text() for end in ("css", "js"))
    # Of scripts a browser runs this one alone, and it loads nothing from anywhere.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )
    title = ", ".join(run.name for run in runs[:4])
    title += f" and {len(runs) - 4} more" if len(runs) > 4 else ""
    now = time.time()
    again = (
        ""
        if refresh_seconds is None
        else f'<noscript><meta http-equiv="refresh" content="{refresh_seconds:g}">'
        "</noscript>"
    )
    reckoned = [goodput(run.columns, run.events or ()) for run in runs]
    parts = [
        f'{BEGINS}<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"{again}<title>{_text(title)}</title><style>\n{style}</style>",
        f"<h1>{_text(title)}</h1>",
        f'<p class="faint">written {_time(now)}<span id="since"></span>; times are '
        f"UTC{time.strftime('%z')}</p>",
        _controls(runs),
        '<noscript><p class="failed">The curves need JavaScript.</p></noscript>',
        _of_many_rows(runs),
        _marks_key(runs),
        '<div id="charts"></div>',
        _results(runs, reckoned),
        _where_time_went(runs, reckoned),
        _lengths(runs),
        _differences(runs),
        _events(runs),
        _configs(runs),
        f'<script type="application/json" id="data">'
        f"{_json(_data(runs, now, refresh_seconds))}</script>",
        f"<script>{script}</script></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


# ---- What the script draws.


def _data(runs: Sequence[Run], now: float, refresh: float | None) -> dict[str, Any]:
    curves = [
        {
            field: found
            for field in (*(field for field, *_ in _CHARTS), "validation_loss")
            if (found := curve(run.columns, field)) is not None
        }
        for run in runs
    ]
    charts = [
        {
            "field": field,
            "title": title,
            "unit": unit,
            "wide": field == "loss",
            "exact": field == "learning_rate",  # is never smoothed
            "dots": "validation_loss" if field == "loss" else None,
        }
        for field, title, unit in _CHARTS
        if any(field in each for each in curves)
    ]
    return {
        "written_unix": now,
        "refresh_seconds": refresh,
        "charts": charts,
        "marks": {kind: path for kind, (path, _) in _MARKS.items()},
        "runs": [
            {
                "name": _seen(run.name),
                "curves": found,
                "along": along(run.columns) if run.num_rows() else {"steps": []},
                "marks": [
                    {"kind": kind, "step": event["step"], "text": _seen(_said(event))}
                    for event in _shown_events(run)
                    if (kind := _kind_of_mark(event)) is not None
                ],
            }
            for run, found in zip(runs, curves, strict=True)
        ],
    }


def _json(value: Any) -> str:
    """For inside of a script element: nothing in it ends that, or begins another."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _kind_of_mark(event: Event) -> str | None:
    kind = event["event"]
    if kind == "started":
        return "resumed" if event["step"] else None
    return kind if kind in _MARKS else None


# ---- Parts of the page.


def _controls(runs: Sequence[Run]) -> str:
    legend = "".join(
        f'<label><input type="checkbox" checked>{_swatch(f"run-{number % 7}")}'
        f"{_text(run.name)}</label>"
        for number, run in enumerate(runs)
    )
    return (
        f'<div id="top"><div id="legend">{legend}</div><div id="controls">'
        '<label>over <select id="x"><option value="step">steps<option value="tokens">'
        'tokens<option value="hours">hours of steps</select></label> '
        '<label>smoothing <input id="smooth" type="range" min="0" max="20" step="1">'
        "</label></div></div>"
    )


def _marks_key(runs: Sequence[Run]) -> str:
    """What the marks in the first chart are, of those that are there."""
    there = {_kind_of_mark(event) for run in runs for event in _shown_events(run)}
    marks = "".join(
        f'<span><svg viewBox="-8 -8 16 16"><path d="{path}"/></svg> {said}</span>'
        for kind, (path, said) in _MARKS.items()
        if kind in there
    )
    dots = any("validation_loss" in run.columns for run in runs)
    return (
        f'<p class="key faint">{"<span>● validation</span>" if dots else ""}{marks}</p>'
    )


def _of_many_rows(runs: Sequence[Run]) -> str:
    long = [run for run in runs if run.num_rows() > MOST_POINTS]
    if not long:
        return ""
    each = ", ".join(
        f"{_text(run.name)} {-(-run.num_rows() // MOST_POINTS):,}" for run in long
    )
    return (
        f'<p class="faint">A curve has at most {MOST_POINTS:,} points. Where a run has '
        "more steps, a point is the mean of several, and the band around it goes from "
        f"the least to the greatest. Steps a point: {each}.</p>"
    )


def _results(runs: Sequence[Run], reckoned: Sequence[Goodput | None]) -> str:
    columns = [_result(*each) for each in zip(runs, reckoned, strict=True)]
    return "<h2>Results</h2>" + _table(
        ["", *(_named(n, run) for n, run in enumerate(runs))],
        [[name, *(each[name] for each in columns)] for name in columns[0]],
    )


def _result(run: Run, reckoned: Goodput | None) -> dict[str, str]:
    columns = run.columns
    total = run.config.get("training.num_steps")
    of = f" of {total:,}" if type(total) is int else ""
    ended = _last_event(run, "failed") if run.state == "failed" else None
    found = {
        "state": f"failed: {ended.get('why', '')}" if ended else run.state,
        "steps": f"{int(columns['step'][-1]):,}{of}" if run.num_rows() else "none yet",
    }
    loss = columns.get("loss", np.array([]))
    finite = loss[np.isfinite(loss)]
    found["last loss"] = f"{finite[-1]:.4f}" if len(finite) else _NOT_KNOWN
    window = max(1, len(finite) // 30)
    found["mean loss of the last 30th"] = (
        f"{finite[-window:].mean():.4f}" if len(finite) else _NOT_KNOWN
    )
    found["best validation loss"] = "none"
    validation = columns.get("validation_loss", np.array([]))
    if np.isfinite(validation).any():
        best = int(np.nanargmin(validation))
        step = int(columns["step"][best])
        found["best validation loss"] = f"{validation[best]:.4f} at step {step:,}"
    found["tokens a second, median"] = _median(columns, "tokens_per_second", ",.0f")
    found["seconds a step, median"] = _median(columns, "seconds", ",.4g")
    found["MFU, median"] = _median(columns, "mfu", ".1%")
    peaks = columns.get("device_peak_bytes", np.array([]))
    known = peaks[np.isfinite(peaks)]
    found["memory of a device at its peak"] = (
        _gib(float(known.max())) if len(known) else _NOT_KNOWN
    )
    found["tokens that counted"] = (
        f"{np.nansum(columns['counted_tokens']):,.0f}"
        if "counted_tokens" in columns
        else _NOT_KNOWN
    )
    known = run.events is not None
    for name, kind in (("steps skipped", "skipped"), ("spikes", "spike")):
        found[name] = f"{len(_of_kind(run, kind)):,}" if known else _NOT_KNOWN
    found["time of steps"] = (
        _duration(float(np.nansum(columns["seconds"])))
        if "seconds" in columns
        else _NOT_KNOWN
    )
    found["time in all"] = _NOT_KNOWN
    found["goodput"] = _NOT_KNOWN
    if reckoned is not None:
        found["time in all"] = _duration(reckoned.whole())
        if reckoned.whole():
            found["goodput"] = f"{reckoned.useful / reckoned.whole():.1%}"
    devices = (_last_event(run, "started") or {}).get("num_devices", "")
    kind = (_last_event(run, "started") or {}).get("device_kind", "")
    found["devices"] = f"{devices} {kind}".strip() or _NOT_KNOWN
    return found


def _where_time_went(runs: Sequence[Run], reckoned: Sequence[Goodput | None]) -> str:
    known = [
        (number, run, each)
        for number, (run, each) in enumerate(zip(runs, reckoned, strict=True))
        if each is not None and each.whole() > 0
    ]
    unknown = [run.name for run, each in zip(runs, reckoned, strict=True) if not each]
    said = ""
    if unknown:
        said = (
            f"<p>Not known of {_text(', '.join(unknown))}: no events.jsonl says when "
            "it was started.</p>"
        )
    if not known:
        return f"<h2>Where the time went</h2>{said}"
    bars = "".join(
        f'<span>{_text(run.name)}</span><div class="bar" role="img" '
        f'aria-label="{each.useful / each.whole():.1%} useful">'
        + "".join(
            f'<i title="{_text(_PARTS[name])}: {_duration(seconds)}, '
            f'{seconds / each.whole():.1%}" style="width:{seconds / each.whole():.4%};'
            f'background:var(--{name})"></i>'
            for name, seconds in each.parts().items()
            if seconds > 0
        )
        + "</div>"
        for _, run, each in known
    )
    rows = [
        [
            Html(f"{_swatch(name)} {_text(said)}"),
            *(
                f"{_duration(seconds)} ({seconds / each.whole():.1%})"
                if (seconds := each.parts()[name])
                else "0"
                for _, _, each in known
            ),
        ]
        for name, said in _PARTS.items()
        if any(each.parts()[name] > 0 for *_, each in known)
    ]
    rows.append(["in all", *(_duration(each.whole()) for *_, each in known)])
    earlier = [
        f"{run.name} before {_time(first)}"
        for _, run, _ in known
        if (first := _untimed_before(run)) is not None
    ]
    if earlier:
        said += (
            "<p>Not in it, since those steps have no time: "
            f"{_text(', '.join(earlier))}.</p>"
        )
    return (
        "<h2>Where the time went</h2><p>From a run's first start to its last sign of "
        "life, over all its starts. Goodput is the useful part.</p>"
        f'<div class="bars">{bars}</div>'
        + _table(["", *(_named(n, run) for n, run, _ in known)], rows)
        + said
    )


def _untimed_before(run: Run) -> float | None:
    """When a run was first started with events, where it had taken steps before."""
    first = next(each for each in run.events or () if each["event"] == "started")
    times = run.columns.get("unix_seconds", np.array([]))
    timed = np.count_nonzero(times >= first["unix_seconds"])
    untimed = run.num_rows() > timed and first["step"] > 0
    return first["unix_seconds"] if untimed else None


def _lengths(runs: Sequence[Run]) -> str:
    """Steps by the length of their rows, of runs where it differs."""
    tables = ""
    for number, run in enumerate(runs):
        columns = run.columns
        if "sequence_tokens" not in columns:
            continue
        lengths = columns["sequence_tokens"]
        rows = []
        for length in np.unique(lengths[np.isfinite(lengths)]):
            own = lengths == length
            of = {name: column[own] for name, column in columns.items()}
            time_of = np.nansum(of.get("seconds", 0.0))
            whole = np.nansum(columns.get("seconds", 0.0))
            rows.append(
                [
                    f"{length:,.0f}",
                    f"{np.count_nonzero(own):,} ({own.mean():.0%})",
                    f"{time_of / whole:.0%}" if whole else _NOT_KNOWN,
                    _median(of, "seconds", ",.4g"),
                    _median(of, "tokens_per_second", ",.0f"),
                    _last_mean(of),
                ]
            )
        header = ["tokens a row", "steps", "of their time", "seconds a step, median"]
        header += ["tokens a second, median", "mean loss of the last 30th"]
        tables += f"<p>{_named(number, run)}</p>{_table(header, rows)}"
    return f"<h2>Lengths</h2>{tables}" if tables else ""


def _last_mean(columns: Columns) -> str:
    loss = columns.get("loss", np.array([]))
    finite = loss[np.isfinite(loss)]
    if not len(finite):
        return _NOT_KNOWN
    return f"{finite[-max(1, len(finite) // 30) :].mean():.4f}"


def _differences(runs: Sequence[Run]) -> str:
    """Fields of the configs that are not the same in all runs."""
    if len(runs) < 2:
        return ""
    fields = dict.fromkeys(field for run in runs for field in run.config)
    rows = []
    for field in fields:
        values = [_value(run.config, field) for run in runs]
        if field != "run.folder" and len(set(values)) > 1:
            rows.append([field, *values])
    if not rows:
        return "<h2>Configs</h2><p>They are the same, but for the folder.</p>"
    return "<h2>What differs in the configs</h2>" + _table(
        ["", *(_named(n, run) for n, run in enumerate(runs))], rows
    )


def _value(config: Mapping[str, Any], field: str) -> str:
    if field not in config:
        return "(no such field)"
    value = config[field]
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _events(runs: Sequence[Run]) -> str:
    rows = [
        (
            event["unix_seconds"],
            [_time(event["unix_seconds"]), _named(number, run)]
            + [f"{event['step']:,}", _said(event)],
        )
        for number, run in enumerate(runs)
        for event in _shown_events(run)
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
        if older := _num_listed(run.events) - _MOST_EVENTS:
            if older > 0:
                notes.append(f"{older:,} older ones of {run.name} are not shown.")
        saved = _of_kind(run, "saved")
        if saved:
            stood = sum(each.get("seconds", 0.0) for each in saved)
            notes.append(
                f"checkpoints that {run.name} began: {len(saved):,}, the last at step "
                f"{saved[-1]['step']:,}; training stood still for {_duration(stood)}"
            )
    said = "".join(f'<p class="faint">{_text(note)}</p>' for note in notes)
    if not rows:
        return f"<h2>Events</h2>{said}" if said else ""
    table = _table(["time", "run", "step", "what"], [row for _, row in rows], "events")
    return f"<h2>Events</h2>{table}{said}"


def _configs(runs: Sequence[Run]) -> str:
    each = "".join(
        f"<details><summary>{_text(run.name)}</summary>"
        f"<pre>{_text(run.config_text)}</pre></details>"
        for run in runs
    )
    return f'<section id="configs"><h2>Whole configs</h2>{each}</section>'


# ---- Events.


def _is_listed(event: Event) -> bool:
    return event["event"] != "saved"  # of which a run has many


def _num_listed(events: Iterable[Event]) -> int:
    return sum(map(_is_listed, events))


def _shown_events(run: Run) -> list[Event]:
    return [event for event in run.events or () if _is_listed(event)][-_MOST_EVENTS:]


def _of_kind(run: Run, kind: str) -> list[Event]:
    return [event for event in run.events or () if event["event"] == kind]


def _last_event(run: Run, kind: str) -> Event | None:
    return (_of_kind(run, kind) or [None])[-1]


def _said(event: Event) -> str:
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
            words += f"; {steps:,} steps are taken again ({_duration(seconds)})"
    elif kind == "compiled" and "seconds" in fields:
        tokens = fields.pop("sequence_tokens", None)
        words += "" if tokens is None else f" the step for rows of {tokens:,} tokens"
        words += f" in {_duration(fields.pop('seconds'))}"
    elif kind == "rolled_back" and "to_step" in fields:
        words += f" to step {fields.pop('to_step'):,}"
    named = {"told": "signal", "profiled": "folder"}.get(kind, "why")
    if named in fields:
        words += f": {fields.pop(named)}"
    peaks = fields.pop("device_peak_bytes", None)
    if isinstance(peaks, list) and peaks and all(type(n) is int for n in peaks):
        words += f"; devices held at most {_gib(min(peaks))} to {_gib(max(peaks))}"
    rest = "; ".join(f"{name} {_short(value)}" for name, value in fields.items())
    return f"{words}; {rest}" if rest else words


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list) and len(value) > 8:
        return f"{json.dumps(value[:8])[:-1]}, ... {len(value):,} in all]"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 2000 else f"{text[:2000]} ..."


# ---- Text.


def _seen(text: str) -> str:
    """Names of files may hold any bytes; a page is UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def _text(text: str) -> str:
    return text if isinstance(text, Html) else escape(_seen(text))


def _swatch(name: str) -> str:
    return f'<span class="swatch" style="background:var(--{name})"></span>'


def _named(number: int, run: Run) -> Html:
    return Html(f"{_swatch(f'run-{number % 7}')} {_text(run.name)}")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    first = ("td", "td") if kind else ("th", "td")
    body = "".join(
        "<tr>"
        + "".join(
            f"<{first[at > 0]}>{_text(cell)}</{first[at > 0]}>"
            for at, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _median(columns: Columns, field: str, spec: str) -> str:
    values = columns.get(field, np.array([]))
    values = values[np.isfinite(values)]
    return format(float(np.median(values)), spec) if len(values) else _NOT_KNOWN


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


def _time(unix_seconds: float) -> str:
    return time.strftime("%F %T", time.localtime(unix_seconds))


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
