"""The proof that a checkpoint is whole: the size and CRC-32 of every file."""

import json
import mmap
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
# Of what one process wrote; `write_commit` takes them up and removes them.
_PART = "files_of_process_{}.json"
# Orbax stamps the time into this one when it renames; restoring does not read it.
_STAMPED = "_CHECKPOINT_METADATA"
_BLOCK_BYTES = 1 << 20
# Up to here a file is proven at once: what says where arrays lie is smaller.
_SMALL_BYTES = 1 << 20


def write_part(folder: Path, process: int) -> None:
    """Writes what `write_commit` needs of the arrays that one process wrote.

    Costs: those files are read once, by that process, as they were just written.
    """
    own = folder / f"ocdbt.process_{process}"  # as Orbax names it
    text = json.dumps(_sizes_and_crcs(folder, own.rglob("*")))
    (folder / _PART.format(process)).write_text(text)


def write_commit(folder: Path, body: dict[str, Any]) -> int:
    """Writes the commit file of a folder whose other files are all written.

    Args:
      body: what JSON can hold; `read_commit` returns it, and under "files" the sizes
        and checksums.

    Returns:
      The bytes of those files.

    Costs: every file that no `write_part` has read is read once.
    """
    files: dict[str, Any] = {}
    for part in folder.glob(_PART.format("*")):
        files |= json.loads(part.read_text())
        part.unlink()
    paths = (p for p in folder.rglob("*") if p.name != _STAMPED)
    others = (p for p in paths if p.relative_to(folder).as_posix() not in files)
    files |= _sizes_and_crcs(folder, others)
    text = json.dumps(body | {"files": files})
    with open(folder / COMMIT_FILE, "w") as file:
        file.write(f"{text}\n{zlib.crc32(text.encode())}\n")
        file.flush()
        os.fsync(file.fileno())
    return sum(size for size, _ in files.values())


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


def why_unfit(folder: Path) -> str | None:
    """Proves the commit file, all sizes and small files: why it is not whole, or None.

    What this lets pass, Orbax can read, right or wrong.
    """
    try:
        files = read_commit(folder)["files"]
    except ValueError as error:
        return str(error)

    def why(name: str) -> str | None:
        check_inside(folder / name, folder)
        found, size = (folder / name).stat().st_size, files[name][0]
        # The size first: it costs nothing, and says more.
        if found != size:
            return f"{name} has {found} bytes, not {size}"
        return _why_other(folder, name, files) if size <= _SMALL_BYTES else None

    return _first(why, list(files))


def why_broken(folder: Path, *, part: int = 0, parts: int = 1) -> str | None:
    """Proves the large files, or a part of them: why it is not whole, or None.

    Args:
      folder: of which `why_unfit` has nothing to say.
      part, parts: the files are dealt to so many, of which this is one.
    """
    files = read_commit(folder)["files"]
    large = sorted(name for name, (size, _) in files.items() if size > _SMALL_BYTES)
    return _first(lambda name: _why_other(folder, name, files), large[part::parts])


def _why_other(folder: Path, name: str, files: dict[str, Any]) -> str | None:
    same = _size_and_crc(folder / name) == tuple(files[name])
    return None if same else f"{name} has other bytes"


def _first(why: Callable[[str], str | None], names: list[str]) -> str | None:
    def told(name: str) -> str | None:
        try:
            return why(name)
        except OSError as error:
            return f"{name}: {error.strerror}"
        except ValueError as error:  # a name that no file has, or one elsewhere
            return f"{name}: {error}"

    return next((found for found in _in_parallel(told, names) if found), None)


def _sizes_and_crcs(folder: Path, paths: Any) -> dict[str, tuple[int, int]]:
    paths = [path for path in paths if path.is_file()]
    names = [path.relative_to(folder).as_posix() for path in paths]
    return dict(zip(names, _in_parallel(_size_and_crc, paths), strict=True))


def _size_and_crc(path: Path) -> tuple[int, int]:
    # Not from the allocator: each save has new threads, glibc deals them over its
    # arenas, eight a core, and each arena would keep the megabyte.
    size, crc, block = 0, 0, memoryview(mmap.mmap(-1, _BLOCK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            size, crc = size + count, zlib.crc32(block[:count], crc)
    return size, crc


def _in_parallel(function: Callable, items: list) -> list:
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, items))
