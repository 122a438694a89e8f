"""Rows of one document each, of several lengths, in a curriculum's order."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from ulysses_jax.config import Config
from ulysses_jax.data.curriculum import LengthSampler
from ulysses_jax.data.decomposition import buckets
from ulysses_jax.data.rows import Rows
from ulysses_jax.data.stream import Stream


class SpanRows(Rows):
    """As `Rows`, but that each row is a span of one document, all of the same length.

    There are no segment ids, and positions start at 0. A row's last token has a label
    too, where its document goes on.

    Args:
      starts: of each row, where in the stream it starts.
    """

    def __init__(self, stream: Stream, length: int, starts: Int64[np.ndarray, "rows"]):
        super().__init__(stream, length, mask_documents=False)
        self.num_tokens = len(starts) * length
        self._starts = starts

    def __len__(self) -> int:
        return len(self._starts)

    def lengths(self, row: int) -> Int64[np.ndarray, "documents"]:
        return np.full(int(row < len(self)), self.sequence_tokens)

    def read(
        self, row: int, start: int, stop: int
    ) -> dict[str, Int32[np.ndarray, "n"]]:
        arrays = self._padding(stop - start)
        stop = min(stop, self.sequence_tokens)
        if row >= len(self) or start >= stop:
            return arrays
        first = int(self._starts[row])
        document = int(np.searchsorted(self.stream.ends, first, side="right"))
        end = self.stream.ends[document : document + 1]
        here = slice(0, stop - start)
        arrays["tokens"][here], arrays["labels"][here] = self._labelled(
            first + start, first + stop, end
        )
        arrays["positions"][here] = np.arange(start, stop, dtype=np.int32)
        return arrays


@dataclass(frozen=True)
class RowsByLength:
    """What a run with `data.lengths` trains on.

    Attributes:
      rows: of each length, in tokens, from the shortest on.
      sampler: which length a step has, and which of its rows.
      notes: for whoever starts the run.
      meta: what the batches depend on, as JSON can hold it.
    """

    rows: dict[int, SpanRows]
    sampler: LengthSampler
    notes: list[str]
    meta: dict[str, Any]


def rows_by_length(stream: Stream, config: Config) -> RowsByLength:
    """The stream's documents cut into rows of `data.lengths`.

    Raises:
      ValueError: a length of which no document gives a row, with the counts of all.

    Cost: 8 bytes a row, and `LengthSampler`'s.
    """
    data, training = config.data, config.training
    found = buckets(stream.ends, data.lengths)
    _refuse_empty(found.num_rows, stream, config)
    tokens = training.batch_size * training.sequence_tokens

    def sampler(cycle_steps: int | None) -> LengthSampler:
        return LengthSampler(
            found.num_rows,
            tokens,
            curriculum=data.curriculum,
            cycle_steps=cycle_steps,
            seed=config.run.seed,
        )

    steps_a_pass = sampler(None).steps_a_pass
    cycle_steps = data.cycle_steps or min(training.num_steps, steps_a_pass)
    order = sampler(cycle_steps)
    in_run = order.num_steps(training.num_steps)
    dropped = found.num_dropped / int(stream.ends[-1])
    notes = [
        f"data.lengths: {in_run[length]:,} of the run's steps have rows of "
        f"{length:,} tokens, of which there are {n:,}"
        for length, n in found.num_rows.items()
    ]
    notes += [
        f"{dropped:.2%} of the training tokens are in no row: what documents have left "
        f"below {data.lengths[0]:,}",
        f"data.curriculum {data.curriculum}: cycles of {cycle_steps:,} steps, a pass "
        f"over the data is {steps_a_pass:,}",
    ]
    notes += [
        f"the rows of {length:,} tokens are {n:,}, fewer than the {tokens // length:,} "
        "of a batch, which holds them more than once"
        for length, n in found.num_rows.items()
        if n < tokens // length
    ]
    meta = {
        "data.lengths": list(data.lengths),
        "data.curriculum": data.curriculum,
        "data.cycle_steps": cycle_steps,
    }
    rows = {
        length: SpanRows(stream, length, starts)
        for length, starts in found.starts.items()
    }
    return RowsByLength(rows, order, notes, meta)


def _refuse_empty(num_rows: dict[int, int], stream: Stream, config: Config) -> None:
    empty = [length for length, n in num_rows.items() if not n]
    if not empty:
        return
    counts = ", ".join(f"{length}: {n:,}" for length, n in num_rows.items())
    some = [length for length, n in num_rows.items() if n]
    longest = int(np.diff(stream.ends, prepend=0).max())
    training = config.training
    if some:
        remedy = f"--data.lengths {' '.join(map(str, some))}"
        if some[-1] != training.sequence_tokens:
            batch = training.batch_size * training.sequence_tokens // some[-1]
            remedy += (
                f" --training.sequence-tokens {some[-1]} --training.batch-size {batch}"
            )
    else:
        remedy = f"powers of 2 of at most {longest}"
    raise ValueError(
        f"data.lengths {', '.join(map(str, empty))}: the training documents, of which "
        f"the longest has {longest:,} tokens, give no such row (rows by length: "
        f"{counts}): use {remedy}, or longer documents"
    )
