"""The corpus: which files are read, and under which names."""

import dataclasses
import glob
import itertools
import os
import stat
import sys
import sysconfig
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path, PurePath
from typing import Literal, NamedTuple

from ulysses_jax.data.datasets_folder import of_datasets
from ulysses_jax.data.prepared import has_shards
from ulysses_jax.run_folder import is_run_folder

Kind = Literal["text", "lines", "parquet", "arrow"]
_KINDS: dict[str, Kind] = {
    ".jsonl": "lines",
    ".jsonl.gz": "lines",
    ".json.gz": "lines",
    ".parquet": "parquet",
    ".arrow": "arrow",
}

_SNIFFED_BYTES = 8192
# Of UTF-16 and UTF-32, whose letters hold NUL bytes.
_BYTE_ORDER_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")
# Opening a file on a network disk is mostly waiting.
_THREADS = 16
_NOT_THE_STDLIB = {"site-packages", "dist-packages", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class Document:
    """One file of the corpus, or the part of one that `split` left.

    Attributes:
      name: relative to what the corpus was opened as, so the same on every machine.
      path: where it is read.
      size: in bytes, when the corpus was opened.
      before, after: bytes of the file that lie around it.
    """

    name: str
    path: Path
    size: int
    before: int = 0
    after: int = 0


def kind_of(name: str) -> Kind:
    """How a file is read, by the end of its name."""
    for end, kind in _KINDS.items():
        if name.lower().endswith(end):
            return kind
    return "text"


class Corpus(NamedTuple):
    documents: list[Document]
    """At least one; none is empty."""
    notes: list[str]
    """What was left out, for the reader of the run's output."""


def find_documents(files: str, run_folder: str | None = None) -> Corpus:
    """Finds and opens, once each, the files that `data.files` names.

    A folder gives all files below it that are not hidden, behind links too; each folder
    is read once. Of a folder or a glob, files that look binary (a NUL byte in their
    first 8 KiB, and no byte order mark) are left out, with a note; a file named by
    itself, the standard library, and what `kind_of` knows, are taken as they are. Of a
    folder that `datasets` saved, only the files that it lists.

    Args:
      files: "stdlib" for the source text of the running Python's standard library, a
        folder, a glob, or a file.
      run_folder: of the run that reads them. What a run writes is no text to train on:
        this folder is left out, and of a folder or ** those of other runs.

    Raises:
      ValueError: nothing matches, nothing is left, or a file cannot be opened.

    Cost: one open and one short read a file, 16 at a time.
    """
    if not files.strip():
        raise ValueError(
            f"data.files {files!r} is empty: give a folder (. is the one you are in), "
            'a glob, a file, or "stdlib"'
        )
    path = Path(os.path.expanduser(files))
    try:
        candidates, runs, may_be_binary = _candidates(path, run_folder)
    except OSError as error:
        raise unreadable(Path(error.filename or files), error) from None
    except UnicodeEncodeError:
        raise ValueError(
            f"data.files {files!r} cannot be a file's name in this locale, whose "
            f"encoding is {sys.getfilesystemencoding()}: set LC_ALL=C.UTF-8"
        ) from None
    if not candidates and not runs:
        if path.is_dir():
            raise ValueError(
                f"the folder {files} of data.files holds no file: put text files into "
                'it, or give another folder, a glob, a file, or "stdlib"'
            )
        raise ValueError(
            f"data.files {files!r} gives no file (looked in {Path.cwd()}): give a "
            'folder, a glob or a file that exists, or "stdlib"'
        )
    candidates, unlisted = of_datasets(candidates)
    with ThreadPoolExecutor(_THREADS) as pool:
        opened = list(pool.map(_open_once, candidates.values()))
    found = [
        (
            Document(name, path, size),
            has_nul and not may_be_binary and kind_of(name) == "text",
        )
        for (name, path), (size, has_nul) in zip(
            candidates.items(), opened, strict=True
        )
    ]
    empty = [document.name for document, _ in found if not document.size]
    binary = [document.name for document, is_binary in found if is_binary]
    documents = [d for d, is_binary in found if d.size and not is_binary]
    notes = []
    if runs:
        notes.append(f"what runs or preparations wrote, in {_some(runs)}")
    if unlisted:
        notes.append(
            f"{_count(unlisted)} that no state.json of a dataset lists: "
            f"{_some(unlisted)}"
        )
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


def root_of(files: str | Path) -> Path:
    """What the names of a glob's files are relative to; else the path itself."""
    parts = Path(os.path.expanduser(files)).parts
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), parts))


def _candidates(
    path: Path, run_folder: str | None
) -> tuple[dict[str, Path], list[str], bool]:
    """Files by name, runs left out, and whether files may look binary."""
    if path == Path("stdlib"):
        root = Path(sysconfig.get_path("stdlib"))
        found = _files(_folders(root, leave_out=_NOT_THE_STDLIB))
        return _named((p for p in found if p.suffix == ".py"), root), [], True
    if path.is_dir():
        if run_folder and os.path.realpath(path) == os.path.realpath(run_folder):
            raise ValueError(
                f"run.folder {run_folder} is the folder of data.files, so that what "
                "the run writes would change what it reads: use a --run.folder below "
                "it or elsewhere"
            )
        named = _named(_files(_folders(path)), path)
        return *_without_runs(named, path, run_folder), False
    # A name with brackets may be that of a file.
    if path.exists() or path.is_symlink() or not glob.has_magic(str(path)):
        return ({path.name: path} if os.path.lexists(path) else {}), [], True
    root = root_of(path)
    named = _named((p for p in _glob(path) if not p.is_dir()), root)
    return *_without_runs(named, root, run_folder), False


def _glob(path: Path) -> Iterator[Path]:
    """As glob.iglob, but ** enters each folder once, whatever links lead to it."""
    parts = path.parts
    if "**" not in parts:
        yield from map(Path, glob.iglob(str(path)))
        return
    at = parts.index("**")
    for top in glob.iglob(str(Path(*parts[:at]))):
        for folder, _ in _folders(Path(top)):
            rest = parts[at + 1 :] or ("*",)
            yield from _glob(Path(glob.escape(str(folder)), *rest))


def _folders(
    root: Path, *, leave_out: Collection[str] = ()
) -> Iterator[tuple[Path, list[str]]]:
    """A folder and those below it that are not hidden, each with its files' names.

    Each is entered once, those behind links after all others: so a link to what is
    there already, or to itself, changes nothing.
    """

    def refuse(error: OSError) -> None:
        raise error

    tops, entered = [root], set()
    for top in tops:
        for folder, folders, files in os.walk(top, onerror=refuse):
            real = os.path.realpath(folder)
            if real in entered:
                folders.clear()
                continue
            entered.add(real)
            folders[:] = sorted(
                f for f in folders if f[0] != "." and f not in leave_out
            )
            below = (Path(folder, f) for f in folders)
            tops += [path for path in below if path.is_symlink()]
            yield Path(folder), files


def _files(folders: Iterable[tuple[Path, list[str]]]) -> Iterator[Path]:
    for folder, files in folders:
        yield from (folder / file for file in files if file[0] != ".")


def _without_runs(
    named: dict[str, Path], root: Path, run_folder: str | None
) -> tuple[dict[str, Path], list[str]]:
    """Files below `root` that no run or preparation wrote, and the folders of these."""
    own = run_folder and os.path.realpath(run_folder)

    @cache
    def run_of(folder: PurePath) -> str | None:
        """The outermost such folder that a folder below root is or lies in."""
        if folder == PurePath():
            return None
        path = root / folder
        is_run = os.path.realpath(path) == own or is_run_folder(path)
        is_run |= has_shards(Path(path))
        return run_of(folder.parent) or (folder.as_posix() if is_run else None)

    runs = {name: run_of(PurePath(name).parent) for name in named}
    rest = {name: path for name, path in named.items() if runs[name] is None}
    return rest, sorted({run for run in runs.values() if run is not None})


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
            start = file.read(_SNIFFED_BYTES)
            has_nul = b"\0" in start and not start.startswith(_BYTE_ORDER_MARKS)
            return os.fstat(file.fileno()).st_size, has_nul
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: OSError) -> ValueError:
    return ValueError(
        f"cannot read {path} of data.files: {error.strerror}: make it readable, or "
        "leave it out with a narrower folder or glob"
    )


def _count(names: Sequence | dict) -> str:
    return f"{len(names):,} file{'' if len(names) == 1 else 's'}"


def _some(names: Sequence[str], most: int = 3) -> str:
    more = [f"and {len(names) - most:,} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])
