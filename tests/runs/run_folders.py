"""Folders as runs leave them, without a run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml


def write_run(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]] | None = None,
    *,
    num_steps: int = 100,
    is_at_work: bool = False,
    **model: Any,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "run": {"folder": str(folder)},
        "model": {"width": 32} | model,
        "training": {"num_steps": num_steps},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.jsonl").write_text(lines(rows))
    if events is not None:
        (folder / "events.jsonl").write_text(lines(events))
    if is_at_work:
        (folder / "lock").write_text("process 1 on here\n")
    return folder


def lines(values: Sequence[Mapping[str, Any]]) -> str:
    return "".join(f"{json.dumps(value)}\n" for value in values)


def row(step: int, loss: float = 2.0, **fields: Any) -> dict[str, Any]:
    return {"step": step, "loss": loss, "seconds": 1.0, **fields}


def event(unix_seconds: float, step: int, kind: str, **fields: Any) -> dict[str, Any]:
    return {"unix_seconds": unix_seconds, "step": step, "event": kind, **fields}
