"""Files that nobody vouches for: JSON up to a size, and no way out of a folder."""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

MOST_BYTES = 2**28
"""Of a file of JSON that grows with a corpus, a vocabulary or a model's tensors."""


def parsed(text: str | bytes, what: object) -> Any:
    """What JSON says.

    Args:
      what: it is, or where it lies, for an error's words.

    Raises:
      ValueError: it is none, or is nested too deep.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is no JSON: {error}") from None


def read_object(path: Path, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
      ValueError: it is none; the file has more bytes, or is a link out of its folder.
      OSError: it cannot be read.
    """
    found = parsed(read_bounded(path, most_bytes), path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no JSON object, but {_kind(found)}")
    return found


def objects_in_lines(path: Path, most_bytes: int = 2**16) -> Iterator[dict[str, Any]]:
    """Of a file of JSON lines each that is an object, of at most so many bytes; others
    are passed over, as one that a killed run left half."""
    with path.open("rb") as file:
        while line := file.readline(most_bytes):
            with suppress(ValueError):
                if isinstance(found := parsed(line, path), dict):
                    yield found


def read_bounded(path: Path, most_bytes: int) -> bytes:
    """A file's bytes; raises as `read_object`."""
    check_inside(path)
    there = path.stat()
    if not stat.S_ISREG(there.st_mode):  # to open a pipe may block for ever
        raise ValueError(f"{path} is no file: put the right one there")
    if there.st_size > most_bytes:
        raise ValueError(
            f"{path} has {there.st_size:,} bytes, and such a file at most "
            f"{most_bytes:,}: put the right one there"
        )
    with path.open("rb") as file:
        return file.read(most_bytes)


def check_inside(path: Path, folder: Path | None = None) -> None:
    """Refuses a file that lies elsewhere than its name says.

    Links within the folder stay, and those of Hugging Face's cache, whose
    `snapshots/REVISION` leads to the `blobs` beside it.

    Args:
      folder: in which it must lie; None: that of its name.

    Raises:
      ValueError: by `..` or a link it leads out.
    """
    folder = path.parent if folder is None else folder
    try:
        real, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    except ValueError as error:  # a NUL, or half of a pair of surrogates
        raise ValueError(f"{str(path)!r} names no file: {error}") from None
    if root.parent.name == "snapshots":
        root = root.parents[1]
    if not real.is_relative_to(root):
        raise ValueError(
            f"{path} leads to {real}, out of {folder}: put the file itself there"
        )


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"
