"""Writes shards of a prepared folder, one after another, each whole or not at all."""

import hashlib
import json
import os
from array import array
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Bool, Int

from ulysses_jax.data.prepared import shard_path


class Shard:
    """One shard while it is written: parts that nobody reads, until `finish`.

    Args:
      dtype: of ids on the disk.
      counts: whether each token says if it counts.
    """

    def __init__(self, folder: Path, number: int, dtype: np.dtype, *, counts: bool):
        self.num_tokens = self.num_skipped = 0
        self._folder, self._number = folder, number
        self._dtype = dtype.newbyteorder("<")
        self._ends = array("q")
        self._bits = np.zeros(0, bool)
        names = ("ids", "ends", *(["counts"] if counts else []))
        self._files = {name: _Part(shard_path(folder, name, number)) for name in names}

    def add(self, ids: Int[np.ndarray, "n"], counts: Bool[np.ndarray, "n"] | None):
        """One document; of one without ids it is counted that it was skipped."""
        if not len(ids):
            self.num_skipped += 1
            return
        self.num_tokens += len(ids)
        self._ends.append(self.num_tokens)
        self._files["ids"].write(ids.astype(self._dtype, copy=False).tobytes())
        if counts is not None:
            bits = np.concatenate([self._bits, counts])
            whole = len(bits) // 8 * 8
            self._bits = bits[whole:]
            self._write_bits(bits[:whole])

    def finish(self) -> dict[str, Any]:
        """Names the files by their own names; what index.json says of them."""
        self._files["ends"].write(np.array(self._ends, "<i8").tobytes())
        if "counts" in self._files:
            self._write_bits(self._bits)
        sha256 = {name: file.finish() for name, file in self._files.items()}
        sync_folder(self._folder)
        return {
            "documents": len(self._ends),
            "tokens": self.num_tokens,
            "skipped": self.num_skipped,
            "sha256": sha256,
        }

    def drop(self) -> None:
        for file in self._files.values():
            file.drop()

    def _write_bits(self, bits: Bool[np.ndarray, "n"]) -> None:
        self._files["counts"].write(np.packbits(bits, bitorder="little").tobytes())


class _Part:
    """A file beside its name, with the checksum of what was written."""

    def __init__(self, path: Path):
        self._path, self._part = path, path.with_name(f"{path.name}.part")
        self._digest = hashlib.sha256()
        self._file = _open_new(self._part)

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)

    def finish(self) -> str:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._part, self._path)
        return self._digest.hexdigest()

    def drop(self) -> None:
        self._file.close()
        self._part.unlink(missing_ok=True)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Whole or not at all, also where the machine loses its power."""
    write_bytes(path, f"{json.dumps(value, indent=1)}\n".encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Whole or not at all; of a link the link is replaced, not what it leads to."""
    part = path.with_name(f"{path.name}.part")
    with _open_new(part) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    sync_folder(path.parent)


def _open_new(path: Path) -> BinaryIO:
    """A file that was not there: what was, also a link, is taken away first."""
    path.unlink(missing_ok=True)
    return open(path, "xb")


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
