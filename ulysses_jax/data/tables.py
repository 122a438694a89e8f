"""Tables in Parquet and Arrow files: a document a row, in a column of strings.

Arrow files are those of a folder that `datasets` saved, a stream of batches; or Arrow's
own file format.
"""

import os
from collections.abc import Iterator
from typing import Any

from ulysses_jax.data.corpus import Document
from ulysses_jax.data.json_lines import Read, check_size

_BATCH_ROWS = 64
_FILE_FORMAT = b"ARROW1"
# A stream that ends without it was cut between two batches.
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def read_parquet(file: Document, column: str, skip: int) -> Iterator[Read]:
    """Raises ValueError: names the file, and the row."""
    pyarrow = _pyarrow(file)
    from pyarrow import parquet

    def batches() -> Iterator[tuple[int, Any, float]]:
        with parquet.ParquetFile(file.path, page_checksum_verification=True) as opened:
            _check_column(file, opened.schema_arrow, column, pyarrow)
            total, first = opened.metadata.num_rows, 0
            for group in range(opened.num_row_groups):
                rows = opened.metadata.row_group(group).num_rows
                if first + rows > skip:
                    at = first
                    for batch in opened.iter_batches(
                        _BATCH_ROWS, row_groups=[group], columns=[column]
                    ):
                        yield at, batch, at / total
                        at += len(batch)
                    if at != first + rows:
                        raise pyarrow.ArrowInvalid(f"row group {group} is cut short")
                first += rows
            if first != total:
                raise pyarrow.ArrowInvalid(f"{first} of {total} rows are there")

    yield from _rows(file, column, skip, batches(), pyarrow)


def read_arrow(file: Document, column: str, skip: int) -> Iterator[Read]:
    """Raises ValueError: names the file, and the row."""
    pyarrow = _pyarrow(file)
    from pyarrow import ipc

    def batches() -> Iterator[tuple[int, Any, float]]:
        with pyarrow.memory_map(str(file.path)) as mapped:
            if mapped.read(len(_FILE_FORMAT)) == _FILE_FORMAT:
                opened = ipc.open_file(mapped)
                found = map(opened.get_batch, range(opened.num_record_batches))
            else:
                mapped.seek(max(file.size - len(_END_OF_STREAM), 0))
                if mapped.read() != _END_OF_STREAM:
                    raise pyarrow.ArrowInvalid("its end is missing")
                mapped.seek(0)
                found = opened = ipc.open_stream(mapped)
            _check_column(file, opened.schema, column, pyarrow)
            at = 0
            for batch in found:
                yield at, batch, mapped.tell() / file.size
                at += len(batch)

    yield from _rows(file, column, skip, batches(), pyarrow)


def _rows(
    file: Document, column: str, skip: int, batches: Iterator[Any], pyarrow: Any
) -> Iterator[Read]:
    row = 0
    try:
        check_size(file, os.stat(file.path).st_size)
        for first, batch, share in batches:
            row, last = first, first + len(batch)
            if last <= skip:
                continue
            values = batch.column(column)
            values.validate(full=True)
            if pyarrow.types.is_dictionary(values.type):
                values = values.dictionary_decode()
            for value in values[max(skip - first, 0) :]:
                row = max(row, skip) + 1
                text = value.as_buffer() if value.is_valid else None
                yield row, b"" if text is None else text.to_pybytes(), share
    # UnicodeDecodeError: of a column's name.
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file.path} is no whole table, after row {row}: {error}: fetch it again"
        ) from None


def _check_column(file: Document, schema: Any, column: str, pyarrow: Any) -> None:
    if column not in schema.names:
        raise ValueError(
            f"{file.path} has no column {column!r} ({', '.join(schema.names)}): name "
            "the one that holds the text, data.text_field"
        )
    if (num := schema.names.count(column)) > 1:
        raise ValueError(
            f"{file.path} has {num} columns {column!r}, and one is read: rename the "
            "others, or name another, data.text_field"
        )
    kind = schema.field(column).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    types = pyarrow.types
    known = (types.is_string, types.is_large_string, types.is_string_view)
    if not any(is_kind(kind) for is_kind in known):
        raise ValueError(
            f"{file.path}: column {column!r} is {kind}, not strings: name the one that "
            "holds the text, data.text_field"
        )


def _pyarrow(file: Document) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise ValueError(
            f"{file.path} is read by pyarrow, which is not installed: pip install "
            "pyarrow (or this project with its extra, '.[data]')"
        ) from None
    return pyarrow
