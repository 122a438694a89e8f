"""JSON lines: a document a line, in a field of an object."""

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from typing import Any

from ulysses_jax.data.corpus import Document, unreadable

MOST_BYTES = 2**30
"""Of a line, or of a document that is a file: it is held whole, a few times."""

Read = tuple[int, bytes, float]
"""A document's number, its text in UTF-8, and the share of the file read by then."""

MARK = b"\xef\xbb\xbf"
"""What some programs begin UTF-8 with; it is no text."""


def read(file: Document, text_field: str | None, skip: int) -> Iterator[Read]:
    """The lines after `skip`; blank ones are none, a null or "" is an empty document.

    Args:
      text_field: None: a document is the whole line, unread.

    Raises:
      ValueError: names the file and the line.
    """
    number = 0
    try:
        with open(file.path, "rb") as raw:
            check_size(file, os.fstat(raw.fileno()).st_size)
            lines = gzip.open(raw) if file.name.lower().endswith(".gz") else raw
            while line := lines.readline(MOST_BYTES + 1):
                number += 1
                if len(line) > MOST_BYTES:
                    raise ValueError(
                        f"{file.path}:{number} is a line of more than {MOST_BYTES:,} "
                        "bytes: is it JSON lines, an object a line? Split the document"
                    )
                if number == 1:
                    line = line.removeprefix(MARK)
                if number > skip and line.strip():
                    data = line
                    if text_field is not None:
                        data = _text(line, text_field, f"{file.path}:{number}")
                    yield number, data, raw.tell() / file.size
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{file.path} is no whole gzip file, after line {number}: {error}: fetch "
            "it again"
        ) from None
    except OSError as error:
        raise unreadable(file.path, error) from None


def check_size(file: Document, size: int) -> None:
    """Raises ValueError: the file is not as it was when the corpus was opened."""
    if size != file.size:
        raise ValueError(
            f"{file.path} had {file.size:,} bytes when it was found, and has {size:,}: "
            "start again when nobody writes it"
        )


def _text(line: bytes, field: str, where: str) -> bytes:
    try:
        said: Any = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is not UTF-8 ({error.reason} at byte {error.start}): iconv -t "
            "utf-8 makes it so"
        ) from None
    except json.JSONDecodeError as error:
        why = error.msg.removesuffix(" at")
        raise ValueError(
            f"{where} is not JSON: {why} at letter {error.pos + 1}: mend the line or "
            "take it out"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where} is not JSON: {error}: mend the line or take it out"
        ) from None
    if not isinstance(said, dict) or field not in said:
        names = ", ".join(map(repr, said)) if isinstance(said, dict) else ""
        raise ValueError(
            f"{where} has no field {field!r} ({names or 'it has none'}): name the "
            "one that holds the text, data.text_field, or take the line out"
            + (
                "; chats are prepared first: python -m ulysses_jax.data prepare --chats"
                if isinstance(said, dict) and {"messages", "prompt"} & said.keys()
                else ""
            )
        )
    text = said[field]
    if text is None:
        return b""
    if not isinstance(text, str):
        raise ValueError(
            f"{where}: field {field!r} is {_kind(text)}, not a string: name the one "
            "that holds the text, data.text_field, or take the line out"
        )
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: field {field!r} has half of a pair of surrogates at letter "
            f"{error.start}, which is no letter: mend the line or take it out"
        ) from None


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), "an object")
