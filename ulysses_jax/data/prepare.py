"""Tokenises files once, into a folder that runs read: `data.prepared` has its form."""

import contextlib
import datetime
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ulysses_jax.data.chats import ExampleEncoder
from ulysses_jax.data.corpus import find_documents
from ulysses_jax.data.index_fields import check_begun
from ulysses_jax.data.prepared import (
    FORMAT,
    INDEX,
    UNFINISHED,
    VERSION,
    faults,
    read_index,
)
from ulysses_jax.data.run_tokenizer import digest_of
from ulysses_jax.data.shards import Shard, write_json
from ulysses_jax.data.sources import name_of, records
from ulysses_jax.data.tokenizer import Bytes, Tokenizer, tokenizer_of
from ulysses_jax.data.workers import Encoded, Encoder, Refused, TextEncoder, encoded
from ulysses_jax.outside import read_object

SHARD_TOKENS = 2**28

Progress = Callable[[float, int, int], None]
"""Told the share of all bytes that is read, and documents and tokens so far."""


def prepare(
    files: str,
    to: Path,
    tokenizer_folder: Path | None = None,
    *,
    text_field: str | None = "text",
    num_workers: int = 1,
    shard_tokens: int = SHARD_TOKENS,
    encoder: Encoder | None = None,
    with_counts: bool = False,
    date: str | None = None,
    on_progress: Progress = lambda share, documents, tokens: None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Writes the tokens of `files` into the folder `to`; goes on where it was ended.

    What is written depends on the files, the tokenizer, the field, the shards' length
    and the date of chats alone: not on the number of processes, nor on how often it was
    ended, nor on the day on which it goes on.

    Args:
      files: as `data.files` of a run.
      to: a new folder, or one that was begun with the same arguments.
      tokenizer_folder: that has a tokenizer.json; None: bytes.
      text_field: of JSON lines and tables; None: a document is a whole line of JSON.
      num_workers: processes that tokenise.
      shard_tokens: a shard ends with the document that reaches them.
      encoder: of a document's data; None: of text, by the tokenizer.
      with_counts: whether the encoder says which tokens count.
      date: 2026-01-31, of an `ExampleEncoder` whose template writes one; None: that
        with which the folder was begun, else today.
      say: told what was left out, and from where it goes on.

    Returns:
      What index.json says.

    Raises:
      ValueError: a file that cannot be read, by line or row; a folder that holds
        something else, or whose begun preparation has other files or another tokenizer.
      OSError: the disk is full.

    Cost: a read of all files; their tokens, 2 or 4 bytes each, and 8 bytes a document.
    """
    if num_workers < 1:
        raise ValueError(f"--workers {num_workers}: give 1 or more")
    if shard_tokens < 1:
        raise ValueError(f"--shard-tokens {shard_tokens}: give 1 or more")
    tokenizer = _tokenizer(tokenizer_folder)
    try:
        found, notes = find_documents(files, str(to))
    except ValueError as error:
        raise ValueError(str(error).replace("run.folder", "--to")) from None
    job = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": "uint16" if tokenizer.num_ids <= 2**16 else "uint32",
        "num_ids": tokenizer.num_ids,
        "tokenizer": digest_of(tokenizer),
        "ends": list(tokenizer.ends),
        "counts": with_counts,
        "text_field": text_field,
        "shard_tokens": shard_tokens,
        "files": [
            {"name": _printable(each.name), "bytes": each.size} for each in found
        ],
    }
    writes_date = isinstance(encoder, ExampleEncoder) and encoder.writes_date()
    if isinstance(encoder, ExampleEncoder):
        job["chat_template"] = encoder.template_digest()
    if date is not None and not writes_date:
        raise ValueError(
            f"--date {date}: no chat template of this preparation writes the date "
            "(strftime_now): leave it out"
        )
    for note in notes:
        say(note)
    with _alone_in(to):
        if writes_date:
            assert isinstance(encoder, ExampleEncoder)
            job["date"] = date or _begun_on(to)
            encoder = encoder.of_date(job["date"])
            say(f"the chat template writes the date {job['date']}")
        if (to / INDEX).exists():
            index = read_index(to)
            _refuse_other_job({name: index.get(name) for name in job}, job, to)
            (to / UNFINISHED).unlink(missing_ok=True)  # killed before it was
            say(f"{to} is prepared already")
            return index
        done = _begun(to, job, say)
        if not done:
            write_json(to / UNFINISHED, {"job": job, "shards": []})
        tokenizer.copy_to(to)
        after = tuple(done[-1]["next"]) if done else (0, 0)
        stream = encoded(
            records(found, text_field, after),
            encoder or TextEncoder(tokenizer_folder),
            np.dtype(job["dtype"]),
            num_workers,
        )
        try:
            with contextlib.closing(stream):
                for shard in _shards(stream, to, job, done, on_progress):
                    done.append(shard)
                    write_json(to / UNFINISHED, {"job": job, "shards": done})
        except ValueError as refused:
            if not done:  # what is mended may be another job
                _clear(to)
            if not isinstance(refused, Refused):
                raise
            file, number = refused.place
            raise ValueError(f"{name_of(found[file], number)}: {refused}") from None
        index = job | {
            name: sum(shard[name] for shard in done)
            for name in ("documents", "tokens", "skipped")
        }
        if not index["tokens"]:
            _clear(to)
            raise ValueError(
                f"--files {files!r}: none of {index['skipped']:,} documents has a "
                "token: give others"
            )
        index["shards"] = [
            {name: value for name, value in shard.items() if name != "next"}
            for shard in done
        ]
        write_json(to / INDEX, index)
        (to / UNFINISHED).unlink()
        return index


def _clear(to: Path) -> None:
    """Takes away what a preparation that has nothing yet has written."""
    for path in (*to.glob("*-[0-9]*.bin*"), to / UNFINISHED):
        path.unlink(missing_ok=True)
    Bytes().copy_to(to)  # no tokenizer's files
    with contextlib.suppress(OSError):  # it holds something else
        to.rmdir()


def _printable(name: str) -> str:
    """A file's name, which need not be UTF-8, as JSON can hold it."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _tokenizer(folder: Path | None) -> Tokenizer:
    if folder is None:
        return Bytes()
    found = tokenizer_of(folder)
    if isinstance(found, Bytes):
        raise ValueError(
            f"--tokenizer {folder} has no tokenizer.json: give a folder that has one, "
            "or bytes"
        )
    return found


def _shards(
    stream: Iterator[Encoded],
    to: Path,
    job: dict[str, Any],
    done: list[dict[str, Any]],
    on_progress: Progress,
) -> Iterator[dict[str, Any]]:
    """Writes the shards after those that are done; each with where its records end."""
    dtype, counts = np.dtype(job["dtype"]), job["counts"]
    sizes = [each["bytes"] for each in job["files"]]
    before = np.cumsum([0, *sizes]).tolist()
    documents, tokens = (sum(s[n] for s in done) for n in ("documents", "tokens"))
    number, shard = len(done), None
    place = (0, 0)
    try:
        for chunk in stream:
            start = 0
            for place, end in zip(chunk.records, chunk.ends.tolist(), strict=True):
                shard = shard or Shard(to, number, dtype, counts=counts)
                own = None if chunk.counts is None else chunk.counts[start:end]
                shard.add(chunk.ids[start:end], own)
                documents, tokens = documents + (end > start), tokens + end - start
                start = end
                if shard.num_tokens >= job["shard_tokens"]:
                    yield shard.finish() | {"next": place}
                    number, shard = number + 1, None
            read = before[place[0]] + chunk.share * sizes[place[0]]
            on_progress(read / max(before[-1], 1), documents, tokens)
        if shard is not None:
            yield shard.finish() | {"next": place}
            shard = None
    finally:
        if shard is not None:
            shard.drop()


def _begun(
    to: Path, job: dict[str, Any], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The shards of a begun preparation, up to the first that is not as written."""
    if not (to / UNFINISHED).is_file():
        others = [each.name for each in to.iterdir() if not each.name.endswith(".part")]
        if others:
            raise ValueError(
                f"--to {to} holds {sorted(others)[0]}: give a new folder, or an empty "
                "one"
            )
        return []
    begun = _read_begun(to)
    _refuse_other_job(begun["job"], job, to)
    shards = begun["shards"]
    for number in range(len(shards)):
        wrong = faults(to, job | {"shards": shards}, number)
        if wrong:
            say(f"{wrong[0]}: made again from there")
            shards = shards[:number]
            break
    tokens = sum(each["tokens"] for each in shards)
    say(f"{to}: {len(shards)} shards of {tokens:,} tokens are there; going on")
    return shards


def _begun_on(to: Path) -> str:
    """The date of a preparation that is there, else today's."""
    said: dict[str, Any] = {}
    if (to / INDEX).exists():
        said = read_index(to)
    elif (to / UNFINISHED).is_file():
        said = _read_begun(to)["job"]
    return said.get("date") or datetime.date.today().isoformat()


def _read_begun(to: Path) -> dict[str, Any]:
    path = to / UNFINISHED
    try:
        begun = read_object(path)
    except ValueError as error:
        raise ValueError(f"{error}: delete {to} and start again") from None
    check_begun(path, begun)
    return begun


def _refuse_other_job(old: dict[str, Any], new: dict[str, Any], to: Path) -> None:
    differ = [
        name if name == "files" else f"{name} was {old.get(name)!r}, is {new[name]!r}"
        for name in new
        if old.get(name) != new[name]
    ]
    if differ:
        raise ValueError(
            f"--to {to} was begun with other arguments or files ({'; '.join(differ)}): "
            "use those, or give a new folder"
        )


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Makes the folder, and locks it for as long as this process lives."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--to {folder} is a file: give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is preparing --to {folder}: wait for it, or give "
                "another folder"
            ) from None
        yield
    finally:
        os.close(descriptor)
