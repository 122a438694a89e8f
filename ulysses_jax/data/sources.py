"""Documents of files of any kind, one after another: text, JSON lines, tables."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ulysses_jax.data import json_lines, tables
from ulysses_jax.data.corpus import Document, kind_of
from ulysses_jax.data.ids import data_of


class Record(NamedTuple):
    """One document of a file.

    Attributes:
      file: its place among the files.
      number: of the file's lines or rows, from 1; of a text file 1.
      data: the text in UTF-8; empty where there is none.
      share: of the file, that is read by then.
    """

    file: int
    number: int
    data: bytes
    share: float


def records(
    files: Sequence[Document], text_field: str | None, after: tuple[int, int] = (0, 0)
) -> Iterator[Record]:
    """The documents of all files, in the files' order; also those without text.

    Args:
      files: whole.
      text_field: of JSON lines and tables, the field or column that holds the text;
        None: whole lines, and nothing but JSON lines.
      after: (file, number) of the record that the first one follows.

    Raises:
      ValueError: names the file, and the line or row, that cannot be read.

    Cost: a document at a time is held, and of a table the batch that it lies in; what
    `after` skips is read as lines, or not at all.
    """
    start, skip = after
    for place in range(start, len(files)):
        file = files[place]
        if text_field is None:
            if kind_of(file.name) != "lines":
                raise ValueError(
                    f"{file.path} is no JSON lines, and examples are objects a line: "
                    "give .jsonl, .jsonl.gz or .json.gz alone"
                )
            for number, data, share in json_lines.read(file, None, skip):
                yield Record(place, number, data, share)
            skip = 0
            continue
        for number, data, share in _READERS[kind_of(file.name)](file, text_field, skip):
            yield Record(place, number, data, share)
        skip = 0


def name_of(file: Document, number: int) -> str:
    """`books.jsonl:17`; of a text file its name."""
    return file.name if kind_of(file.name) == "text" else f"{file.name}:{number}"


def _whole(file: Document, text_field: str, skip: int) -> Iterator[json_lines.Read]:
    if skip:
        return
    if file.size > json_lines.MOST_BYTES:
        raise ValueError(
            f"{file.path} of {file.size:,} bytes is one document, of more than "
            f"{json_lines.MOST_BYTES:,}: split it; or, as bytes, give it to a run as "
            "it is"
        )
    yield 1, data_of(file).removeprefix(json_lines.MARK), 1.0


_READERS = {
    "text": _whole,
    "lines": json_lines.read,
    "parquet": tables.read_parquet,
    "arrow": tables.read_arrow,
}
