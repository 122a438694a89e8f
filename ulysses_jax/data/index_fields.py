"""What index.json and unfinished.json of a prepared folder must say, field by field."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

_DTYPES = {"uint16": 2**16, "uint32": 2**32}
_MOST = 2**62  # tokens and bytes are counted in int64


def check_index(path: Path, index: dict[str, Any]) -> None:
    """Raises ValueError: names the file, and the field that is missing or wrong."""
    _check_job(path, "", index)
    shards = _checked_shards(path, index, index)
    for name in ("documents", "tokens", "skipped"):
        total = sum(shard[name] for shard in shards)
        if _get(path, "", index, name, _is_count) != total:
            raise _wrong(path, name, index[name], f"{total:,}, the sum of its shards'")
    if not shards or not index["tokens"]:
        raise _wrong(path, "tokens", index["tokens"], "1 or more")


def check_begun(path: Path, begun: dict[str, Any]) -> None:
    """Raises ValueError: as `check_index`, of unfinished.json."""
    job = _get(path, "", begun, "job", lambda value: isinstance(value, dict), "object")
    _check_job(path, "job.", job)
    for number, shard in enumerate(_checked_shards(path, begun, job)):
        pair = shard.get("next")
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(map(_is_count, pair))
        ):
            raise _wrong(path, f"shards[{number}].next", pair, "[file, number]")


def _check_job(path: Path, at: str, job: dict[str, Any]) -> None:
    dtype = _get(path, at, job, "dtype", lambda v: v in _DTYPES, " or ".join(_DTYPES))
    most = _DTYPES[dtype]
    num = _get(
        path,
        at,
        job,
        "num_ids",
        lambda v: _is_count(v) and 0 < v <= most,
        f"1 to {most:,}",
    )
    _get(path, at, job, "tokenizer", _is_text, "text")
    _get(
        path,
        at,
        job,
        "ends",
        lambda v: isinstance(v, list) and all(_is_count(i) and i < num for i in v),
        f"a list of ids below {num:,}",
    )
    _get(path, at, job, "counts", lambda v: type(v) is bool, "true or false")
    _get(
        path, at, job, "text_field", lambda v: v is None or _is_text(v), "text or null"
    )
    _get(path, at, job, "shard_tokens", lambda v: _is_count(v) and v > 0, "1 or more")
    files = _get(path, at, job, "files", lambda v: isinstance(v, list), "a list")
    for number, file in enumerate(files):
        here = f"{at}files[{number}]"
        if not isinstance(file, dict):
            raise _wrong(path, here, file, "an object")
        _get(path, f"{here}.", file, "name", _is_text, "text")
        _get(path, f"{here}.", file, "bytes", _is_count)
    if "date" in job:
        _get(path, at, job, "date", _is_date, "a date, as 2026-01-31")


def _checked_shards(
    path: Path, said: dict[str, Any], job: dict[str, Any]
) -> list[dict[str, Any]]:
    shards = _get(path, "", said, "shards", lambda v: isinstance(v, list), "a list")
    names = ["ids", "ends", *(["counts"] if job["counts"] else [])]
    for number, shard in enumerate(shards):
        here = f"shards[{number}]"
        if not isinstance(shard, dict):
            raise _wrong(path, here, shard, "an object")
        for name in ("documents", "tokens", "skipped"):
            _get(path, f"{here}.", shard, name, _is_count)
        sums = _get(
            path,
            f"{here}.",
            shard,
            "sha256",
            lambda v: isinstance(v, dict),
            "an object",
        )
        for name in names:
            _get(path, f"{here}.sha256.", sums, name, _is_sha256, "64 hex digits")
        if shard["documents"] > shard["tokens"]:
            raise _wrong(
                path,
                f"{here}.documents",
                shard["documents"],
                f"at most its {shard['tokens']:,} tokens",
            )
    return shards


def _get(
    path: Path,
    at: str,
    said: dict[str, Any],
    name: str,
    is_right: Callable[[Any], bool],
    kind: str = "a whole number, 0 or more",
) -> Any:
    if name not in said:
        raise ValueError(f"{path} has no field {at}{name}: {_REMEDY}")
    value = said[name]
    try:
        right = is_right(value)
    except TypeError:  # of a value that has no hash
        right = False
    if not right:
        raise _wrong(path, f"{at}{name}", value, kind)
    return value


_REMEDY = "delete the folder and prepare the files again"


def _wrong(path: Path, field: str, value: Any, kind: str) -> ValueError:
    return ValueError(f"{path}: {field} is {_short(value)}, not {kind}: {_REMEDY}")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_sha256(value: Any) -> bool:
    return _is_text(value) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_date(value: Any) -> bool:
    return _is_text(value) and re.fullmatch(r"\d{4}-\d\d-\d\d", value) is not None


def _short(value: Any) -> str:
    found = repr(value)
    return f"{found[:60]}..." if len(found) > 60 else found
