"""A prepared folder: tokens in shards on the disk, of which a reader maps its part.

    index.json        what the folder holds; it is there once all the rest is
    ids-00000.bin     ids of whole documents end to end, uint16 or uint32
    ends-00000.bin    where each document ends in its shard, exclusive, int64
    counts-00000.bin  a bit a token, lowest first: whether the loss asks for it; only
                      where index.json has counts true
    tokenizer.json, generation_config.json, chat_template.jinja, ...    all that goes
                      along with the tokenizer, unless it is bytes

All numbers are little-endian.
"""

import hashlib
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Int64

from ulysses_jax.data.index_fields import check_index
from ulysses_jax.outside import check_inside, read_object

INDEX, UNFINISHED = "index.json", "unfinished.json"
FORMAT, VERSION = "ulysses_jax tokens", 1
_READ_BYTES = 2**24


def is_prepared(folder: Path) -> bool:
    """Whether `prepare` wrote the folder, or has begun to."""
    if (folder / UNFINISHED).is_file():
        return True
    return _said(folder).get("format") == FORMAT


def has_shards(folder: Path) -> bool:
    """Whether files in it are those of `prepare`, by their names alone."""
    if (folder / UNFINISHED).is_file():
        return True
    return (folder / INDEX).is_file() and shard_path(folder, "ids", 0).is_file()


def shard_path(folder: Path, what: str, shard: int) -> Path:
    return folder / f"{what}-{shard:05d}.bin"


def read_index(folder: Path) -> dict[str, Any]:
    """index.json of a folder that is whole.

    Raises:
      ValueError: it is not finished, or of another version; or a field is missing or
        wrong, by its name.
    """
    index = _said(folder)
    if not index and not (folder / UNFINISHED).is_file():
        what = "is no folder" if not folder.is_dir() else f"has no {INDEX}"
        raise ValueError(
            f"{folder} {what}: give one that python -m ulysses_jax.data prepare wrote"
        )
    if not index:
        raise ValueError(
            f"{folder} is not prepared to its end: the same line of python -m "
            "ulysses_jax.data prepare goes on where it stopped"
        )
    if index.get("format") != FORMAT or index.get("version") != VERSION:
        raise ValueError(
            f"{folder / INDEX} is {index.get('format')!r} version "
            f"{index.get('version')!r}, and version {VERSION} is read here: "
            "delete the folder and prepare the files again"
        )
    check_index(folder / INDEX, index)
    return index


def _said(folder: Path) -> dict[str, Any]:
    """What index.json says; nothing where there is none, or none of ours."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    try:
        return read_object(path)
    except ValueError as error:
        if shard_path(folder, "ids", 0).exists():
            raise ValueError(
                f"{error}: delete the folder and prepare the files again"
            ) from None
    return {}


def fingerprint_of(folder: Path) -> str:
    """A digest of index.json, which has those of all shards: 32 hexadecimal digits."""
    data = (folder / INDEX).read_bytes()
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def sizes_of(index: dict[str, Any], shard: int) -> dict[str, int]:
    """Bytes of each of a shard's files."""
    said = index["shards"][shard]
    sizes = {
        "ids": said["tokens"] * np.dtype(index["dtype"]).itemsize,
        "ends": said["documents"] * 8,
        "counts": math.ceil(said["tokens"] / 8),
    }
    return sizes if index["counts"] else {name: sizes[name] for name in ("ids", "ends")}


def faults(folder: Path, index: dict[str, Any], shard: int) -> list[str]:
    """What is wrong with a shard's files, in size or in checksum; reads all of them."""
    found = []
    for what, size in sizes_of(index, shard).items():
        path = shard_path(folder, what, shard)
        said = index["shards"][shard]["sha256"][what]
        there = _size(path)
        if there != size:
            found.append(_other_size(path, size, there))
        elif sha256_of(path) != said:
            found.append(f"{path} is not what was written: its sha256 is not {said}")
    return found


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(_READ_BYTES):
            digest.update(part)
    return digest.hexdigest()


class PreparedTokens:
    """The tokens of a prepared folder: a `data.tokens.Tokens`.

    Attributes:
      ends: as of any `Tokens`.
      index: of index.json.
      num_read_bytes: of ids, so far.

    Raises:
      ValueError: index.json, as `read_index`; a file is missing or of another size, by
        name; the ends of documents are not those that were written, or are none.

    Cost: 8 bytes a document are read and held; of tokens, those that are asked for.
    """

    def __init__(self, folder: Path):
        self.folder, self.index = folder, read_index(folder)
        shards = self.index["shards"]
        for shard in range(len(shards)):
            for what, size in sizes_of(self.index, shard).items():
                path = shard_path(folder, what, shard)
                check_inside(path)
                _check_size(path, size)
        self._tokens = np.cumsum([0, *(each["tokens"] for each in shards)])
        self.ends = np.concatenate(
            [
                self._read_ends(shard) + self._tokens[shard]
                for shard in range(len(shards))
            ]
        )
        self._dtype = np.dtype(self.index["dtype"]).newbyteorder("<")
        self._maps: dict[Path, np.memmap] = {}
        self.num_read_bytes = 0

    def ids(self, first: int, last: int) -> Int[np.ndarray, "n"]:
        """Raises ValueError: a shard is not as long as it was, or has an id that its
        tokenizer has not."""
        parts, most = [], self.index["num_ids"]
        for shard, start, stop in self._where(first, last):
            part = self._mapped("ids", shard, self._dtype)[start:stop]
            if (largest := int(part.max(initial=0))) >= most:
                raise ValueError(
                    f"{shard_path(self.folder, 'ids', shard)} has the id {largest:,}, "
                    f"and its tokenizer has {most:,}: fetch it again, or prepare the "
                    "files again"
                )
            parts.append(part)
        self.num_read_bytes += (last - first) * self._dtype.itemsize
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def counts(self, first: int, last: int) -> Bool[np.ndarray, "n"] | None:
        if not self.index["counts"]:
            return None
        parts = []
        for shard, start, stop in self._where(first, last):
            packed = self._mapped("counts", shard, np.dtype(np.uint8))
            bits = np.unpackbits(
                packed[start // 8 : math.ceil(stop / 8)], bitorder="little"
            )
            parts.append(bits[start % 8 : start % 8 + stop - start].astype(bool))
        return np.concatenate(parts) if parts else np.zeros(0, bool)

    def _where(self, first: int, last: int) -> list[tuple[int, int, int]]:
        """Shards, and the parts of them that are tokens [first, last)."""
        low = int(np.searchsorted(self._tokens, first, side="right")) - 1
        found = []
        while first < last:
            begin, end = int(self._tokens[low]), int(self._tokens[low + 1])
            stop = min(last, end)
            found.append((low, first - begin, stop - begin))
            first, low = stop, low + 1
        return found

    def _mapped(self, what: str, shard: int, dtype: np.dtype) -> np.memmap:
        path = shard_path(self.folder, what, shard)
        # To read past the end of a mapped file ends a process without a word.
        _check_size(path, sizes_of(self.index, shard)[what])
        if path not in self._maps:
            self._maps[path] = np.memmap(path, dtype, "r")
        return self._maps[path]

    def _read_ends(self, shard: int) -> Int64[np.ndarray, "documents"]:
        path = shard_path(self.folder, "ends", shard)
        data = path.read_bytes()
        if (
            hashlib.sha256(data).hexdigest()
            != self.index["shards"][shard]["sha256"]["ends"]
        ):
            raise ValueError(
                f"{path} is not what was written: fetch it again, or prepare the files "
                "again"
            )
        ends, tokens = np.frombuffer(data, "<i8"), self._tokens[shard : shard + 2]
        last = int(ends[-1]) if len(ends) else 0
        if (np.diff(ends, prepend=0) <= 0).any() or last != tokens[1] - tokens[0]:
            raise ValueError(
                f"{path} is no list of ends that rise to the {tokens[1] - tokens[0]:,} "
                "tokens of its shard: prepare the files again in another folder"
            )
        return ends


def _size(path: Path) -> int | None:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return None


def _other_size(path: Path, size: int, there: int | None) -> str:
    has = "is missing" if there is None else f"has {there:,} bytes"
    return f"{path} {has}, and had {size:,} bytes when it was written"


def _check_size(path: Path, size: int) -> None:
    there = _size(path)
    if there != size:
        raise ValueError(
            f"{_other_size(path, size, there)}: fetch it again, or prepare the files "
            "again in another folder"
        )
