"""A curve of any number of rows in a bounded number of points."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ulysses_jax.runs.read import Columns

MOST_POINTS = 1000


def curve(columns: Columns, field: str) -> dict[str, Any] | None:
    """A field over steps: each of at most `MOST_POINTS` points is of as many rows.

    Returns:
      `steps`, the last of each point, and `mean`; where a point is of `rows` > 1 also
      `least` and `greatest`. Points without a finite number are left out. None: no row
      has one.
    """
    values = columns.get(field)
    if values is None or not np.isfinite(values).any():
        return None
    if field == "validation_loss":  # few rows have it: a point is of those alone
        found = np.isfinite(values)
        return _of(columns["step"][found], values[found])
    return _of(columns["step"], values)


def _of(steps: np.ndarray, values: np.ndarray) -> dict[str, Any]:
    rows = -(-len(steps) // MOST_POINTS)
    starts = np.arange(0, len(steps), rows)
    finite = np.isfinite(values)
    counts = np.add.reduceat(finite.astype(int), starts)
    there = counts > 0
    last = steps[np.append(starts[1:], len(steps)) - 1][there]
    sums = np.add.reduceat(np.where(finite, values, 0.0), starts)
    found: dict[str, Any] = {
        "rows": rows,
        "steps": [int(step) for step in last],
        "mean": rounded(sums[there] / counts[there]),
    }
    if rows > 1:
        least = np.minimum.reduceat(np.where(finite, values, np.inf), starts)
        greatest = np.maximum.reduceat(np.where(finite, values, -np.inf), starts)
        found |= {
            "least": rounded(least[there]),
            "greatest": rounded(greatest[there]),
        }
    return found


def along(columns: Columns) -> dict[str, Any]:
    """What else may stand under a curve, by step: tokens that counted, and hours of
    steps, from the start of the run."""
    steps = columns["step"]
    at = np.unique(np.linspace(0, len(steps) - 1, MOST_POINTS).astype(int))
    found: dict[str, Any] = {"steps": [int(step) for step in steps[at]]}
    for name, field, unit in (
        ("tokens", "counted_tokens", 1.0),
        ("hours", "seconds", 3600.0),
    ):
        if field in columns:
            sums = np.cumsum(np.nan_to_num(columns[field])) / unit
            found[name] = rounded(sums[at])
    return found


def rounded(values: np.ndarray) -> Sequence[float]:
    """To what a picture shows, in few letters."""
    return [float(f"{value:.6g}") for value in values]
