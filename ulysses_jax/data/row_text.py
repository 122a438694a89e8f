"""A row as people read it: its documents as text, their positions, what counts."""

import io
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from ulysses_jax.data.rows import Rows
from ulysses_jax.data.tokenizer import IGNORED, Bytes, Tokenizer


class Segment(NamedTuple):
    """A document's tokens in a row, or padding.

    Attributes:
      number: its segment id; 0: padding, or documents that see each other.
      first, last: its tokens are those [first, last) of the row.
      positions: of its first and last token.
      tokens: its ids.
      counts: which of them a label of this row asks for.
    """

    number: int
    first: int
    last: int
    positions: tuple[int, int]
    tokens: Int32[np.ndarray, "n"]
    counts: Bool[np.ndarray, "n"]


def segments_of(rows: Rows, row: int) -> list[Segment]:
    """Raises ValueError: there is no such row."""
    if not 0 <= row < len(rows):
        raise ValueError(f"--row {row}: there are rows 0 to {len(rows) - 1}")
    read = rows.read(row, 0, rows.sequence_tokens)
    ids = read.get("segment_ids")
    if ids is None:
        used = rows.lengths(row).sum()
        ids = (np.arange(rows.sequence_tokens) < used).astype(np.int32)
    counts = np.append(False, read["labels"][:-1] != IGNORED)
    borders = [0, *(np.flatnonzero(np.diff(ids)) + 1).tolist(), len(ids)]
    return [
        Segment(
            int(ids[first]),
            first,
            last,
            (int(read["positions"][first]), int(read["positions"][last - 1])),
            read["tokens"][first:last],
            counts[first:last],
        )
        for first, last in zip(borders, borders[1:], strict=False)
    ]


def lines_of(
    segments: list[Segment], tokenizer: Tokenizer
) -> Iterator[tuple[str, str]]:
    """(a line that says what it is, its text with what does not count in brackets)."""
    for segment in segments:
        num = segment.last - segment.first
        if not segment.number:
            yield f"tokens {segment.first:,} to {segment.last - 1:,}: padding", ""
            continue
        positions = "{:,} to {:,}".format(*segment.positions)
        yield (
            f"segment {segment.number}: tokens {segment.first:,} to "
            f"{segment.last - 1:,}, positions {positions}, {num:,} tokens, "
            f"{int(segment.counts.sum()):,} count",
            "".join(_marked(segment, tokenizer)),
        )


def _marked(segment: Segment, tokenizer: Tokenizer) -> Iterator[str]:
    """Text, run by run of tokens that count or do not."""
    counts = segment.counts
    borders = [0, *(np.flatnonzero(np.diff(counts)) + 1).tolist(), len(counts)]
    for first, last in zip(borders, borders[1:], strict=False):
        text = _text(segment.tokens[first:last].tolist(), tokenizer)
        yield text if counts[first] else f"[{text}]"


def _text(ids: list[int], tokenizer: Tokenizer) -> str:
    """As text, special tokens by their names; of bytes the end of a document, which has
    none, as <256>."""
    if not isinstance(tokenizer, Bytes):
        return tokenizer.decode(ids, special=True)
    parts, run = [], []
    for each in ids:
        if each not in tokenizer.ends:
            run.append(each)
            continue
        parts += [tokenizer.decode(run), f"<{each}>"]
        run = []
    return "".join([*parts, tokenizer.decode(run)])


def draw(segments: list[Segment], *, title: str) -> bytes:
    """A picture of the row: a bar of its documents, their positions, what counts."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (top, middle, bottom) = pyplot.subplots(
        3, 1, figsize=(9, 4), sharex=True, height_ratios=(1, 3, 1), layout="tight"
    )
    colours = matplotlib.colormaps["tab20"].colors  # pyright: ignore
    for segment in segments:
        first, last = segment.first, segment.last
        colour = colours[segment.number % len(colours)] if segment.number else "white"
        top.axvspan(first, last, color=colour)
        if segment.number:
            middle.plot((first, last - 1), segment.positions, color=colour)
        bottom.fill_between(
            np.arange(first, last + 1),
            np.append(segment.counts, segment.counts[-1]).astype(float),
            step="post",
            color="0.3",
        )
    top.set(title=title, ylabel="documents", yticks=[])
    middle.set(ylabel="position")
    bottom.set(ylabel="counts", yticks=[0, 1], xlabel="token of the row")
    bottom.set_xlim(0, segments[-1].last)
    with io.BytesIO() as file:
        figure.savefig(file, dpi=120)
        pyplot.close(figure)
        return file.getvalue()
