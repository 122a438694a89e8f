"""One HTML page of runs: curves, numbers, where the time went, configs, events."""

import base64
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ulysses_jax.runs.curves import MOST_POINTS, along, curve
from ulysses_jax.runs.events import (
    MARKS,
    events_of,
    in_words,
    kind_of_mark,
    last_event,
    of_kind,
    shown_events,
)
from ulysses_jax.runs.goodput import Goodput, goodput
from ulysses_jax.runs.read import Columns, Run
from ulysses_jax.runs.text import (
    Html,
    clock,
    duration,
    escaped,
    gib,
    named,
    seen,
    swatch,
    table,
)

# What a page of this program begins with; another file is not written over.
BEGINS = (
    '<!doctype html><html lang="en"><meta name="generator" content="ulysses_jax.runs">'
)

_HERE = Path(__file__).parent
_NOT_KNOWN = "not known"
# Fields of a config, by their beginnings, on which no number of a run depends.
_OF_A_START = ("run.folder", "run.wandb", "quiet", "profile", "distributed")

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
        f"{again}<title>{escaped(title)}</title><style>\n{style}</style>",
        f"<h1>{escaped(title)}</h1>",
        f'<p class="faint">written {clock(now)}<span id="since"></span>; times are '
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
        events_of(runs),
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
        "marks": {kind: path for kind, (path, _) in MARKS.items()},
        "runs": [
            {
                "name": seen(run.name),
                "curves": found,
                "along": along(run.columns) if run.num_rows() else {"steps": []},
                "marks": [
                    {"kind": kind, "step": event["step"], "text": seen(in_words(event))}
                    for event in shown_events(run)
                    if (kind := kind_of_mark(event)) is not None
                ],
            }
            for run, found in zip(runs, curves, strict=True)
        ],
    }


def _json(value: Any) -> str:
    """For inside of a script element: nothing in it ends that, or begins another."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


# ---- Parts of the page.


def _controls(runs: Sequence[Run]) -> str:
    legend = "".join(
        f'<label><input type="checkbox" checked>{swatch(f"run-{number % 7}")}'
        f"{escaped(run.name)}</label>"
        for number, run in enumerate(runs)
    )
    return (
        f'<div id="top"><div id="legend">{legend}</div><div id="controls">'
        '<label>over <select id="x"><option value="step">steps<option value="tokens">'
        'tokens<option value="hours">hours of steps</select></label> '
        '<label>smoothing <input id="smooth" type="range" min="0" max="20" step="1">'
        '<output id="window"></output></label></div></div>'
    )


def _marks_key(runs: Sequence[Run]) -> str:
    """What the marks in the first chart are, of those that are there."""
    there = {kind_of_mark(event) for run in runs for event in shown_events(run)}
    marks = "".join(
        f'<span><svg viewBox="-8 -8 16 16"><path d="{path}"/></svg> {said}</span>'
        for kind, (path, said) in MARKS.items()
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
        f"{escaped(run.name)} {-(-run.num_rows() // MOST_POINTS):,}" for run in long
    )
    return (
        f'<p class="faint">A curve has at most {MOST_POINTS:,} points. Where a run has '
        "more steps, a point is the mean of several, and the band around it goes from "
        f"the least to the greatest. Steps a point: {each}.</p>"
    )


def _results(runs: Sequence[Run], reckoned: Sequence[Goodput | None]) -> str:
    # As many in all, so that they can be compared.
    last = max(1, max(run.num_rows() for run in runs) // 30)
    columns = [_result(*each, last) for each in zip(runs, reckoned, strict=True)]
    return "<h2>Results</h2>" + table(
        ["", *(named(n, run) for n, run in enumerate(runs))],
        [[name, *(each[name] for each in columns)] for name in columns[0]],
    )


def _result(run: Run, reckoned: Goodput | None, last: int) -> dict[str, str]:
    columns = run.columns
    total = run.config.get("training.num_steps")
    of = f" of {total:,}" if type(total) is int else ""
    ended = last_event(run, "failed") if run.state == "failed" else None
    found = {
        "state": f"failed: {ended.get('why', '')}" if ended else run.state,
        "steps": f"{int(columns['step'][-1]):,}{of}" if run.num_rows() else "none yet",
    }
    found["last loss"] = _last_mean(columns, 1)
    found[f"mean loss of the last {last:,} steps"] = _last_mean(columns, last)
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
        gib(float(known.max())) if len(known) else _NOT_KNOWN
    )
    found["tokens that counted"] = (
        f"{np.nansum(columns['counted_tokens']):,.0f}"
        if "counted_tokens" in columns
        else _NOT_KNOWN
    )
    known = run.events is not None
    for name, kind in (("steps skipped", "skipped"), ("spikes", "spike")):
        found[name] = f"{len(of_kind(run, kind)):,}" if known else _NOT_KNOWN
    found["time of steps"] = (
        duration(float(np.nansum(columns["seconds"])))
        if "seconds" in columns
        else _NOT_KNOWN
    )
    found["time in all"] = _NOT_KNOWN
    found["goodput"] = _NOT_KNOWN
    if reckoned is not None:
        found["time in all"] = duration(reckoned.whole())
        if reckoned.whole():
            found["goodput"] = f"{reckoned.useful / reckoned.whole():.1%}"
    devices = (last_event(run, "started") or {}).get("num_devices", "")
    kind = (last_event(run, "started") or {}).get("device_kind", "")
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
            f"<p>Not known of {escaped(', '.join(unknown))}: no events.jsonl says when "
            "it was started.</p>"
        )
    if not known:
        return f"<h2>Where the time went</h2>{said}"
    bars = "".join(
        f'<span>{escaped(run.name)}</span><div class="bar" role="img" '
        f'aria-label="{each.useful / each.whole():.1%} useful">'
        + "".join(
            f'<i title="{escaped(_PARTS[name])}: {duration(seconds)}, '
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
            Html(f"{swatch(name)} {escaped(said)}"),
            *(
                f"{duration(seconds)} ({seconds / each.whole():.1%})"
                if (seconds := each.parts()[name])
                else "0"
                for _, _, each in known
            ),
        ]
        for name, said in _PARTS.items()
        if any(each.parts()[name] > 0 for *_, each in known)
    ]
    rows.append(["in all", *(duration(each.whole()) for *_, each in known)])
    earlier = [
        f"{run.name} before {clock(first)}"
        for _, run, _ in known
        if (first := _untimed_before(run)) is not None
    ]
    if earlier:
        said += (
            "<p>Not in it, since those steps have no time: "
            f"{escaped(', '.join(earlier))}.</p>"
        )
    return (
        "<h2>Where the time went</h2><p>From a run's first start to its last sign of "
        "life, over all its starts. Goodput is the useful part.</p>"
        f'<div class="bars">{bars}</div>'
        + table(["", *(named(n, run) for n, run, _ in known)], rows)
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
                    _last_mean(of, max(1, int(np.count_nonzero(own)) // 30)),
                ]
            )
        header = ["tokens a row", "steps", "of their time", "seconds a step, median"]
        header += ["tokens a second, median", "mean loss of their last 30th"]
        tables += f"<p>{named(number, run)}</p>{table(header, rows)}"
    return f"<h2>Lengths</h2>{tables}" if tables else ""


def _last_mean(columns: Columns, steps: int) -> str:
    """Of the last steps that have a loss."""
    loss = columns.get("loss", np.array([]))
    finite = loss[np.isfinite(loss)]
    return f"{finite[-steps:].mean():.4f}" if len(finite) else _NOT_KNOWN


def _differences(runs: Sequence[Run]) -> str:
    """Fields of the configs that are not the same in all runs, of those that what comes
    out may depend on."""
    if len(runs) < 2:
        return ""
    fields = dict.fromkeys(field for run in runs for field in run.config)
    rows = []
    for field in fields:
        values = [_value(run.config, field) for run in runs]
        if not field.startswith(_OF_A_START) and len(set(values)) > 1:
            rows.append([field, *values])
    if not rows:
        same = "They are the same, but for folders and what is of a start alone."
        return f"<h2>Configs</h2><p>{same}</p>"
    return "<h2>What differs in the configs</h2>" + table(
        ["", *(named(n, run) for n, run in enumerate(runs))], rows
    )


def _value(config: Mapping[str, Any], field: str) -> str:
    if field not in config:
        return "(no such field)"
    value = config[field]
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _configs(runs: Sequence[Run]) -> str:
    each = "".join(
        f"<details><summary>{escaped(run.name)}</summary>"
        f"<pre>{escaped(run.config_text)}</pre></details>"
        for run in runs
    )
    return f'<section id="configs"><h2>Whole configs</h2>{each}</section>'


def _median(columns: Columns, field: str, spec: str) -> str:
    values = columns.get(field, np.array([]))
    values = values[np.isfinite(values)]
    return format(float(np.median(values)), spec) if len(values) else _NOT_KNOWN
