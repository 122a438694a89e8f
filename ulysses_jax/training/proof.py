"""The proof that a checkpoint is whole: the size and CRC-32 of every file."""

import json
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ulysses_jax.outside import MOST_BYTES, check_inside, parsed, read_bounded

# Written last, inside the folder that one rename then commits: what the run was, and
# the size and CRC-32 of every file. Orbax notices a truncated file, but restores
# flipped bytes in array data without a word.
COMMIT_FILE = "commit.json"
# Orbax stamps the time into this one when it renames; restoring does not read it.
_STAMPED = "_CHECKPOINT_METADATA"


def write_commit(folder: Path, body: dict[str, Any]) -> None:
    """Writes the commit file of a folder whose other files are all written.

    Args:
      body: what JSON can hold; `read_commit` returns it, and under "files" the sizes
        and checksums.

    Costs: every file is read once.
    """
    paths = [p for p in folder.rglob("*") if p.is_file() and p.name != _STAMPED]
    names = [path.relative_to(folder).as_posix() for path in paths]
    files = dict(zip(names, _in_parallel(_size_and_crc, paths), strict=True))
    text = json.dumps(body | {"files": files})
    with open(folder / COMMIT_FILE, "w") as file:
        file.write(f"{text}\n{zlib.crc32(text.encode())}\n")
        file.flush()
        os.fsync(file.fileno())


def read_commit(folder: Path) -> dict[str, Any]:
    """The commit file of a checkpoint; ValueError when it is missing or broken."""
    try:
        data = read_bounded(folder / COMMIT_FILE, MOST_BYTES)
        text, crc = data.decode().splitlines()
        said = parsed(text, COMMIT_FILE)
        if zlib.crc32(text.encode()) == int(crc) and _is_commit(said):
            return said
    except FileNotFoundError:
        raise ValueError(f"{COMMIT_FILE} is missing: it was never committed") from None
    except (OSError, ValueError):
        pass
    raise ValueError(f"{COMMIT_FILE} is not what was saved")


def _is_commit(said: Any) -> bool:
    if not isinstance(said, dict) or type(said.get("step")) is not int:
        return False
    if not all(isinstance(said.get(name), dict) for name in ("meta", "arrays")):
        return False
    files = said.get("files")
    return isinstance(files, dict) and all(
        isinstance(pair, list) and [type(number) for number in pair] == [int, int]
        for pair in files.values()
    )


def why_broken(folder: Path) -> str | None:
    """Proves every file of a checkpoint; None when it is whole."""
    try:
        files = read_commit(folder)["files"]
    except ValueError as error:
        return str(error)

    def why(name: str) -> str | None:
        size, crc = files[name]
        path = folder / name
        try:
            check_inside(path, folder)
            # The size first: it costs nothing, and says more.
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, not {size}"
            return None if _size_and_crc(path)[1] == crc else f"{name} has other bytes"
        except OSError as error:
            return f"{name}: {error.strerror}"
        except ValueError as error:  # a name that no file has, or one elsewhere
            return f"{name}: {error}"

    return next((found for found in _in_parallel(why, list(files)) if found), None)


def _size_and_crc(path: Path) -> tuple[int, int]:
    size, crc = 0, 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


def _in_parallel(function: Callable, items: list) -> list:
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, items))
