"""What a run is refused for before it starts: its folder, its disk, another model."""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ulysses_jax.config import Distributed, Model


@contextmanager
def agreed() -> Iterator[None]:
    """Checks that one process may fail alone: if one does, all of them raise.

    Raises:
      ValueError, OSError: what this process met; ValueError: what another one did.
    """
    if jax.process_count() == 1:
        yield
        return
    met: Exception | None = None
    try:
        yield
    except (ValueError, OSError) as error:
        met = error
    failed = multihost_utils.process_allgather(np.int32(met is not None))
    if met is not None:
        raise met
    if failed.any():
        others = np.flatnonzero(failed).tolist()
        raise ValueError(f"processes {others} refuse to start: their output says why")


def check_processes(distributed: Distributed) -> None:
    """Refuses a run of another number of processes than there are.

    Raises:
      ValueError: with both, and how to start them.
    """
    asked, here = distributed.num_processes, jax.process_count()
    if asked not in (None, here):
        raise ValueError(
            f"distributed.num_processes is {asked}, but JAX knows of {here}: before "
            "JAX has devices call ulysses_jax.distributed.start_distributed, in each "
            "process, or run python -m ulysses_jax.train; to train in this process "
            "alone, leave the section distributed out"
        )


def check_folder(folder: Path) -> None:
    """Refuses a run's folder that cannot be made or written.

    Raises:
      ValueError: names what is in the way.
    """
    folder = folder.absolute()
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        why = "is not a folder"
    elif not os.access(there, os.W_OK | os.X_OK):
        why = "may not be written"
    else:
        return
    raise ValueError(
        f"run.folder {folder}: {there} {why}; use another run.folder (--run.folder)"
    )


def check_space(folder: Path, state_bytes: int, keep: int) -> None:
    """Refuses a run whose checkpoints would not fit on the disk.

    Args:
      folder: of the checkpoints; may not exist yet. What lies in it counts as room: it
        is replaced.
      state_bytes: of the whole state, over all devices.
      keep: how many checkpoints stay; one more is there while the next is written.

    Raises:
      ValueError: with what is needed and what is free.
    """
    folder = folder.absolute()
    present = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    needed = max((keep + 1) * state_bytes - present, 0)
    disk = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(disk).free
    if free < needed:
        fits = (free + present) // state_bytes - 1
        fewer = f"set training.keep_checkpoints to {fits}, " if fits >= 1 else ""
        raise ValueError(
            f"checkpoints need {gb(needed)} more in {folder} ({keep} to keep and one "
            f"being written, {gb(state_bytes)} each), but {gb(free)} are free: "
            f"{fewer}free some space or use a run.folder (--run.folder) on another disk"
        )


def architecture(model: Model) -> dict[str, Any]:
    """The fields that a model's parameters depend on, for a checkpoint's meta."""
    fields = dataclasses.asdict(model)
    for name in (
        "attention",
        "strategy",
        "zigzag",
        "compute_dtype",
        "from_",
    ):  # how it is computed
        del fields[name]
    if model.lora is None:  # as in checkpoints from before there were adapters
        del fields["lora"]
    return fields


def refuse_other_model(meta_model: dict[str, Any], model: dict[str, Any]) -> None:
    """Refuses to resume one model from the checkpoint of another.

    Args:
      meta_model: the model's fields in the checkpoint's meta.
      model: the model's fields now.

    Raises:
      ValueError: names every field that differs, with both values.
    """
    if differ := differences(meta_model, model):
        raise ValueError(
            f"the checkpoint is of another model ({'; '.join(differ)}): use another "
            "run.folder (--run.folder), or the config it was made with"
        )


def refuse_other_optimizer(was: str, now: str) -> None:
    """Refuses to resume with one optimizer the state of another.

    Raises:
      ValueError: with the names of both.
    """
    if was != now:
        raise ValueError(
            f"the checkpoint has the state of training.optimizer {was}, and the config "
            f"says {now}: set it to {was}; or use another run.folder (--run.folder), "
            "with run.after to start from the parameters of this one"
        )


def differences(meta_model: dict[str, Any], model: dict[str, Any]) -> list[str]:
    """What of a model is other than in a checkpoint, field by field, with both values.

    Args: as `refuse_other_model`.

    Raises:
      ValueError: they are not of one class.
    """
    was, now = (each.get("class", "Transformer") for each in (meta_model, model))
    if was != now:
        raise ValueError(
            f"the checkpoint is of a {was}, and make_model makes a {now}: give the "
            "make_model that the run was trained with (train.py makes a Transformer), "
            "or use another run.folder (--run.folder)"
        )
    saved = flat(meta_model)
    here = flat(json.loads(json.dumps(model)))  # tuples are lists, as in meta
    return [
        f"model.{name} was {saved.get(name, 'absent')}, is {here.get(name, 'absent')}"
        for name in {**saved, **here}
        if name not in here or name not in saved or saved[name] != here[name]
    ]


def flat(fields: dict[str, Any]) -> dict[str, Any]:
    """Those of sections by their full names."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            found |= {f"{name}.{inner}": x for inner, x in flat(value).items()}
        else:
            found[name] = value
    return found


def gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3g} GB"
