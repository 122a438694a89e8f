"""The corpus: which files are read, under which names, and which of them validate."""

import glob
import hashlib
import math
import os
import stat
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_SNIFFED_BYTES = 8192
# Opening a file on a network disk is mostly waiting.
_THREADS = 16
_NOT_THE_STDLIB = {"site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """One file of the corpus.

    Attributes:
      name: relative to what the corpus was opened as, so the same on every machine.
      path: where it is read.
      size: in bytes, when the corpus was opened.
    """

    name: str
    path: Path
    size: int


class Corpus(NamedTuple):
    documents: list[Document]
    """At least one; none is empty."""
    notes: list[str]
    """What was left out, for the reader of the run's output."""


def find_documents(files: str) -> Corpus:
    """Finds and opens, once each, the files that `data.files` names.

    A folder gives all files below it that are not hidden. Of a folder or a glob, files
    that look binary (a NUL byte in their first 8 KiB) are left out, with a note; a file
    named by itself, and the standard library, are taken as they are.

    Args:
      files: "stdlib" for the source text of the running Python's standard library, a
        folder, a glob, or a file.

    Raises:
      ValueError: nothing matches, nothing is left, or a file cannot be opened.

    Cost: one open and one short read a file, 16 at a time.
    """
    try:
        candidates, may_be_binary = _candidates(files)
    except OSError as error:
        raise _unreadable(Path(error.filename or files), error) from None
    if not candidates:
        if Path(files).is_dir():
            raise ValueError(
                f"the folder {files} of data.files holds no file: put text files into "
                'it, or give another folder, a glob, a file, or "stdlib"'
            )
        raise ValueError(
            f"data.files {files!r} gives no file (looked in {Path.cwd()}): give a "
            'folder, a glob or a file that exists, or "stdlib"'
        )
    with ThreadPoolExecutor(_THREADS) as pool:
        opened = list(pool.map(_open_once, candidates.values()))
    found = [
        (Document(name, path, size), has_nul and not may_be_binary)
        for (name, path), (size, has_nul) in zip(
            candidates.items(), opened, strict=True
        )
    ]
    empty = [document.name for document, _ in found if not document.size]
    binary = [document.name for document, is_binary in found if is_binary]
    documents = [d for d, is_binary in found if d.size and not is_binary]
    notes = []
    if empty:
        notes.append(f"{_count(empty)} of 0 bytes: {_some(empty)}")
    if binary:
        notes.append(
            f"{_count(binary)} with a NUL byte in the first {_SNIFFED_BYTES} bytes, as "
            f"binary: {_some(binary)} (a file named by itself is read as it is)"
        )
    if not documents:
        raise ValueError(
            f"data.files {files!r} gives {_count(candidates)}, but no text: "
            f"{'; '.join(notes)}. Give other files"
        )
    return Corpus(documents, [f"data.files {files!r}: left out {n}" for n in notes])


def split(
    documents: Sequence[Document], validation_fraction: float
) -> tuple[list[Document], list[Document]]:
    """Parts the files into (train, validation), by a hash of their names.

    The part of a file changes with none but its name, and neither with the order in
    which files are found nor with the machine. The first ceil(fraction x files) by hash
    validate, and both parts have a file; at a fraction of 0 none validates.

    Raises:
      ValueError: one file cannot be parted.
    """
    ordered = _by_hash(documents, salt="split")
    if validation_fraction == 0:
        return ordered, []
    if len(ordered) == 1:
        raise ValueError(
            f"data.files is 1 file ({ordered[0].name}), and data.validation_fraction "
            f"{validation_fraction} takes whole files: use data.validation_fraction 0, "
            "or give 2 files or more"
        )
    # The product of a decimal fraction may lie a hair above its whole number.
    wanted = math.ceil(round(validation_fraction * len(ordered), 6))
    num = min(max(wanted, 1), len(ordered) - 1)
    return ordered[num:], ordered[:num]


def shuffled(documents: Sequence[Document], seed: int) -> list[Document]:
    """The documents in an order that follows from their names and the seed alone."""
    return _by_hash(documents, salt=f"order {seed}")


def fingerprint(documents: Iterable[Document]) -> str:
    """A digest of all names and sizes, in any order: 32 hexadecimal digits.

    A file that was edited and kept its size is not seen.
    """
    digest = hashlib.blake2b(digest_size=16)
    for document in sorted(documents, key=lambda d: os.fsencode(d.name)):
        digest.update(b"%s\0%d\n" % (os.fsencode(document.name), document.size))
    return digest.hexdigest()


def _candidates(files: str) -> tuple[dict[str, Path], bool]:
    """Files by name, and whether they are read even if they look binary."""
    if files == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        found = _walk(root, leave_out=_NOT_THE_STDLIB)
        return _named((p for p in found if p.suffix == ".py"), root), True
    path = Path(files).expanduser()
    if path.is_dir():
        return _named(_walk(path, leave_out=set()), path), False
    # A name with brackets may be that of a file.
    if path.exists() or path.is_symlink() or not glob.has_magic(str(path)):
        return ({path.name: path} if os.path.lexists(path) else {}), True
    plain = []
    for part in path.parts:
        if glob.has_magic(part):
            break
        plain.append(part)
    root = Path(*plain)
    matches = (Path(match) for match in glob.iglob(str(path), recursive=True))
    return _named((p for p in matches if not p.is_dir()), root), False


def _walk(root: Path, *, leave_out: set[str]) -> Iterator[Path]:
    """Files below a folder that are not hidden; links to folders are not followed."""

    def refuse(error: OSError) -> None:
        raise error

    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = [f for f in folders if f[0] != "." and f not in leave_out]
        yield from (Path(folder, file) for file in files if file[0] != ".")


def _named(paths: Iterable[Path], root: Path) -> dict[str, Path]:
    named = {path.relative_to(root).as_posix(): path for path in paths}
    return dict(sorted(named.items(), key=lambda item: os.fsencode(item[0])))


def _open_once(path: Path) -> tuple[int, bool]:
    """A file's size, and whether there is a NUL byte near its start."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe may block for ever
            raise ValueError(
                f"{path} of data.files is not a regular file: take it out of the "
                "folder or the glob, or give another file"
            )
        with open(path, "rb", buffering=0) as file:
            return os.fstat(file.fileno()).st_size, b"\0" in file.read(_SNIFFED_BYTES)
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> ValueError:
    return ValueError(
        f"cannot read {path} of data.files: {error.strerror}: make it readable, or "
        "leave it out with a narrower folder or glob"
    )


def _by_hash(documents: Iterable[Document], *, salt: str) -> list[Document]:
    def place(document: Document) -> bytes:
        return hashlib.blake2b(os.fsencode(f"{salt} {document.name}")).digest()

    return sorted(documents, key=place)


def _count(names: Sequence | dict) -> str:
    return f"{len(names):,} file{'' if len(names) == 1 else 's'}"


def _some(names: Sequence[str], most: int = 3) -> str:
    more = [f"and {len(names) - most:,} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])
