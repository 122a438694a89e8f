"""Documents encoded by several processes, in their own order."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Int, Int64

from ulysses_jax.data.ids import ids_of
from ulysses_jax.data.sources import Record
from ulysses_jax.data.tokenizer import Bytes, Tokenizer, tokenizer_of

# What goes to a process at a time: its start and its result's way back are paid by it.
_CHUNK_BYTES, _CHUNK_RECORDS = 2**20, 2**10


class Encoder(Protocol):
    """Makes a document's data ids, in a process of its own: it must be picklable."""

    def __call__(
        self, data: bytes
    ) -> tuple[Int[np.ndarray, "n"], Bool[np.ndarray, "n"] | None]:
        """The ids, and which of them the loss asks for; None: all, of any document."""
        ...


class TextEncoder:
    """Text by a folder's tokenizer, or as bytes; each document ends with the id for it.

    Args:
      folder: that has the tokenizer; None: bytes.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._tokenizer: Tokenizer | None = None

    def __call__(self, data: bytes) -> tuple[Int[np.ndarray, "n"], None]:
        if self._tokenizer is None:
            folder = self._folder
            self._tokenizer = Bytes() if folder is None else tokenizer_of(folder)
        end = next(iter(self._tokenizer.ends), None)
        return ids_of(data, self._tokenizer, end), None

    def __getstate__(self) -> dict:
        return {"_folder": self._folder, "_tokenizer": None}


class Refused(ValueError):
    """What an encoder says of a document.

    Attributes:
      place: in its chunk; of what `encoded` raises (file, number).
    """

    def __init__(self, place, words: str):
        super().__init__(place, words)
        self.place, self.words = place, words

    def __str__(self) -> str:
        return self.words


class Encoded(NamedTuple):
    """What became of some records, one after another."""

    records: list[tuple[int, int]]
    """(file, number) of each."""
    share: float
    """Of the last one's file, that is read."""
    ids: Int[np.ndarray, "n"]
    ends: Int64[np.ndarray, "records"]
    counts: Bool[np.ndarray, "n"] | None


def encoded(
    records: Iterable[Record], encoder: Encoder, dtype: np.dtype, num_workers: int
) -> Generator[Encoded, None, None]:
    """Records by the chunk, in their order, whatever the number of processes.

    Args:
      num_workers: 1: this process alone.

    Raises:
      Refused: the encoder raised a ValueError.
      ValueError: a process was ended from outside, as where memory is short.

    Cost: at most 2 chunks a process are under way; a chunk is 1 MiB or one document.
    """
    chunks = _chunks(records)
    if num_workers == 1:
        for chunk in chunks:
            with _named(chunk):
                found = _encode(encoder, [r.data for r in chunk], dtype)
            yield _joined(chunk, *found)
        return
    under_way: deque[tuple[list[Record], Future]] = deque()
    pool = ProcessPoolExecutor(
        num_workers, multiprocessing.get_context("spawn"), _start, (encoder, dtype)
    )
    try:
        for chunk in chunks:
            under_way.append((chunk, pool.submit(_work, [r.data for r in chunk])))
            if len(under_way) >= 2 * num_workers:
                yield _finished(*under_way.popleft())
        while under_way:
            yield _finished(*under_way.popleft())
    except BrokenProcessPool:
        raise ValueError(
            f"one of {num_workers} processes that tokenise was ended from outside, as "
            "where memory is short: the same line with fewer --workers goes on"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    chunk, size = [], 0
    for record in records:
        chunk.append(record)
        size += len(record.data)
        if size >= _CHUNK_BYTES or len(chunk) >= _CHUNK_RECORDS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _finished(chunk: list[Record], future: Future) -> Encoded:
    with _named(chunk):
        found = future.result()
    return _joined(chunk, *found)


@contextlib.contextmanager
def _named(chunk: list[Record]) -> Iterator[None]:
    try:
        yield
    except Refused as refused:
        record = chunk[refused.place]
        raise Refused((record.file, record.number), refused.words) from None


def _joined(
    chunk: list[Record],
    ids: Int[np.ndarray, "n"],
    ends: Int64[np.ndarray, "records"],
    counts: Bool[np.ndarray, "n"] | None,
) -> Encoded:
    places = [(record.file, record.number) for record in chunk]
    return Encoded(places, chunk[-1].share, ids, ends, counts)


def _encode(
    encoder: Encoder, documents: list[bytes], dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    found = []
    for place, each in enumerate(documents):
        try:
            found.append(encoder(each))
        except ValueError as error:
            raise Refused(place, str(error)) from None
    ids = np.concatenate([each for each, _ in found]).astype(dtype, copy=False)
    ends = np.cumsum([len(each) for each, _ in found])
    counts = [each for _, each in found if each is not None]
    return ids, ends, np.concatenate(counts) if counts else None


# Of a process that encodes: what it was started with.
_started: list[tuple[Encoder, np.dtype]] = []


def _start(encoder: Encoder, dtype: np.dtype) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
    _started[:] = [(encoder, dtype)]
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)  # a pool's own would wait for work for ever

    threading.Thread(target=watch, daemon=True).start()


def _work(documents: list[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    ((encoder, dtype),) = _started
    return _encode(encoder, documents, dtype)
