"""The weights that a run's adapters are of: of the folder that the run began with."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ulysses_jax.config import Config
from ulysses_jax.tensors.expected import Expected, open_source
from ulysses_jax.tensors.files import Tensors

_SAMPLES, _SAMPLE_BYTES = 16, 2**16


def open_base(config: Config) -> tuple[Tensors, list[Expected]]:
    """The folder `model.from`, of a run with `model.lora`.

    Raises:
      ValueError: it is not there, or not whole; says that the run reads it again.
    """
    try:
        return open_source(config.model)
    except ValueError as error:
        raise ValueError(
            f"{error}; a run with model.lora keeps its adapters alone, and reads the "
            f"weights that they are of from model.from {config.model.from_} each time: "
            "put the folder back, or say where it is (--model.from)"
        ) from None


def fingerprint(tensors: Tensors) -> dict[str, str]:
    """Of each file of a folder's weights, for a checkpoint's meta: its size, and a hash
    of its tensors' names and shapes and of a megabyte here and there."""
    files: dict[Path, list[Any]] = {}
    for name, entry in sorted(tensors.entries.items()):
        files.setdefault(entry.file, []).append([name, entry.shape, entry.dtype])
    found = {}
    for path, entries in files.items():
        digest = hashlib.sha256(json.dumps(entries).encode())
        size = path.stat().st_size
        with path.open("rb") as file:
            for place in range(_SAMPLES):
                file.seek(max(size - _SAMPLE_BYTES, 0) * place // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
        found[path.name] = f"{size} bytes, {digest.hexdigest()[:16]}"
    return found


def refuse_other_base(was: dict[str, str], now: dict[str, str], config: Config) -> None:
    """Refuses adapters on other weights than they were trained on.

    Args:
      was: `fingerprint` in the checkpoint's meta.

    Raises:
      ValueError: names the files that differ.
    """
    differ = [
        f"{name} was {was.get(name, 'absent')}, is {now.get(name, 'absent')}"
        for name in sorted({**was, **now})
        if was.get(name) != now.get(name)
    ]
    if differ:
        raise ValueError(
            f"the checkpoint's adapters are of other weights than those in model.from "
            f"{config.model.from_} ({'; '.join(differ)}): give the folder that the run "
            "began with (--model.from), or use another run.folder (--run.folder)"
        )
