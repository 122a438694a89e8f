"""Batches on the mesh: each process reads its own boxes of rows and tokens, ahead."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import grain
import jax
import numpy as np
from jaxtyping import Int, Int32

from ulysses_jax.data.balance import deal, work
from ulysses_jax.data.curriculum import Choice
from ulysses_jax.data.rows import Rows
from ulysses_jax.data.tokenizer import IGNORED
from ulysses_jax.parallel.zigzag import zigzag_ranges

Box = tuple[tuple[int, int], ...]
"""(start, stop) in each dim of a batch: accumulation steps, B, T."""

Batch = dict[str, jax.Array]
Batches = grain.DatasetIterator[Batch]
Numbers = Int[np.ndarray, "rows"]

# Batches that are made while the devices compute, and threads that make them.
_AHEAD = 2
_THREADS = 2
_CHECKED_TOKENS = 2**16


def batches(
    rows: Rows,
    shape: tuple[int, int, int],
    sharding: jax.sharding.Sharding,
    *,
    seed: int,
    start_step: int = 0,
    zigzag_members: int = 1,
    balanced_groups: int = 1,
) -> Batches:
    """Training batches without end, from any step on.

    Batch n is the rows [n A B, (n + 1) A B) of `rows.shuffled`: epochs, each a shuffle
    of all rows. It depends on (seed, n, A B, rows) alone, so on no mesh and no number
    of processes. Reading starts at once, in threads.

    Args:
      rows: what to read.
      shape: of the batch, global: [A accumulation steps, B, T], T padded to the mesh.
      sharding: of every array of the batch. Of each distinct box of the batch that it
        places on this process's devices, this process reads the bytes once.
      seed: of the shuffle; any integer.
      start_step: the first batch's number, reached at no cost.
      zigzag_members: over how many members the tokens of a row lie in zigzag order
        (`parallel.zigzag.zigzag_ranges`); 1: in the sequence's own.
      balanced_groups: over how many groups of devices a batch's rows are dealt by their
        work (`data.balance`), which sets their order in it; 1: they stay in order.

    Returns:
      An iterator of int32 global arrays `[A, B, T]` by `rows.names`. `close()` it, or
      let it go. It raises ValueError when a file changed under it.

    Cost: three batches' own boxes, in host and in device memory, 4 bytes an element.
    """
    order = shuffled_order(rows, shape, seed=seed, balanced_groups=balanced_groups)
    length = rows.sequence_tokens
    layout = Layout(shape, sharding, zigzag_members)
    return batches_in_order(
        order, {length: rows}, {length: layout}, start_step=start_step
    )


class Layout(NamedTuple):
    """How a batch lies: `shape`, `sharding` and `zigzag_members` of `batches`."""

    shape: tuple[int, int, int]
    sharding: jax.sharding.Sharding
    zigzag_members: int = 1


Order = Callable[[int], Choice]
"""Which rows a step reads, by the step, from 0 on; in the order in which they lie."""


def shuffled_order(
    rows: Rows, shape: tuple[int, int, int], *, seed: int, balanced_groups: int = 1
) -> Order:
    """That of `batches`, which has the arguments; it reads no tokens."""
    order, size = rows.shuffled(seed), math.prod(shape[:2])

    def at(step: int) -> Choice:
        numbers = _numbers(order, step, size)
        if balanced_groups > 1:
            works = [work(rows.lengths(int(number))) for number in numbers]
            numbers = numbers[deal(works, shape[0], balanced_groups).ravel()]
        return Choice(rows.sequence_tokens, numbers)

    return at


def batches_in_order(
    order: Order,
    rows: Mapping[int, Rows],
    layouts: Mapping[int, Layout],
    *,
    start_step: int = 0,
) -> Batches:
    """As `batches`, of rows of one length each.

    Args:
      order: which length a step has, and which of its rows.
      rows: of each length.
      layouts: of a batch of each length.
    """
    read = {length: _reader(rows[length], layout) for length, layout in layouts.items()}

    def at(step: int) -> Batch:
        length, numbers = order(step)
        return read[length](numbers)

    return _ahead(at, range(start_step, np.iinfo(np.int32).max))


def validation_batches(
    rows: Rows,
    shape: tuple[int, int, int],
    sharding: jax.sharding.Sharding,
    *,
    num_batches: int,
    zigzag_members: int = 1,
) -> Batches:
    """The first `num_batches` x A x B rows, in order: the same ones every time.

    Args:
      rows, shape, sharding, zigzag_members: as for `batches`.
      num_batches: of training's size; fewer where the rows end, and padded there.

    Returns:
      An iterator of up to num_batches x A dicts of arrays `[1, B, T]`, otherwise as
      `batches` does, so A does not change which rows are read.
    """
    accumulation_steps, batch, tokens = shape
    num = min(num_batches * accumulation_steps, math.ceil(len(rows) / batch))
    order = [*rows.in_order()[: num * batch]]
    order += range(len(rows), len(rows) + num * batch - len(order))  # padding
    read = _reader(rows, Layout((1, batch, tokens), sharding, zigzag_members))
    return _ahead(lambda step: read(_numbers(order, step, batch)), range(num))


def refuse_uncounted(rows: Rows, num_rows: int) -> None:
    """Raises ValueError where none of the first rows that validate has a label.

    Cost: reads tokens up to the first label; in most data that is the second one.
    """
    numbers = rows.in_order()[:num_rows]
    for row in numbers:
        for start in range(0, rows.sequence_tokens, _CHECKED_TOKENS):
            stop = min(start + _CHECKED_TOKENS, rows.sequence_tokens)
            if (rows.read(row, start, stop)["labels"] != IGNORED).any():
                return
    raise ValueError(
        f"none of the tokens of the {len(numbers):,} rows of {rows.sequence_tokens:,} "
        "that would validate counts, so they have no loss: use "
        "training.validation_batches 0; or, in a new run, a larger "
        "data.validation_fraction"
    )


def local_boxes(
    sharding: jax.sharding.Sharding, shape: tuple[int, int, int]
) -> list[Box]:
    """The distinct boxes of an array of `shape` that this process's devices hold."""
    indices = sharding.addressable_devices_indices_map(shape).values()
    return sorted({_box(index, shape) for index in indices})


def read_box(
    rows: Rows,
    numbers: Int[np.ndarray, "A B"],
    box: Box,
    ranges: Sequence[tuple[int, int]] | None = None,
) -> dict[str, Int32[np.ndarray, "a b t"]]:
    """One box of the batch that has these row numbers, by `rows.names`.

    Args:
      ranges: of a row, where the box's tokens stand one after the other; None: at the
        box's own.
    """
    accumulation_steps, batch, (start, stop) = box
    numbers = numbers[slice(*accumulation_steps), slice(*batch)]
    arrays = {
        name: np.empty((*numbers.shape, stop - start), np.int32) for name in rows.names
    }
    for place, row in np.ndenumerate(numbers):
        at = 0
        for first, last in ranges or [(start, stop)]:
            here = slice(at, at + last - first)
            for name, values in rows.read(int(row), first, last).items():
                arrays[name][place][here] = values
            at = here.stop
    return arrays


def _numbers(
    order: Sequence[int] | grain.MapDataset[int], step: int, size: int
) -> Numbers:
    """Those of batch `step`, where each takes the next `size` of `order`."""
    return np.array([order[i] for i in range(step * size, (step + 1) * size)], np.int64)


def _reader(rows: Rows, layout: Layout) -> Callable[[Numbers], Batch]:
    """Makes a batch of the rows with A B numbers, on the devices."""
    shape, sharding, zigzag_members = layout
    boxes = {
        box: zigzag_ranges(*box[2], shape[2], zigzag_members)
        for box in local_boxes(sharding, shape)
    }

    def read(numbers: Numbers) -> Batch:
        numbers = numbers.reshape(shape[:2])
        pieces = {
            box: read_box(rows, numbers, box, ranges) for box, ranges in boxes.items()
        }

        def place(name: str) -> jax.Array:
            return jax.make_array_from_callback(
                shape,
                sharding,
                lambda index: pieces[_box(index, shape)][name],
                dtype=np.int32,
            )

        return {name: place(name) for name in rows.names}

    return read


def _ahead(at: Callable[[int], Batch], steps: range) -> Batches:
    """Batches `steps`, made in threads before they are asked for."""
    iterator = iter(
        grain.MapDataset.range(steps.start, steps.stop)
        .map(at)
        .to_iter_dataset(
            grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD)
        )
    )
    iterator.start_prefetch()
    return iterator


def _box(index: tuple[slice, ...] | None, shape: tuple[int, int, int]) -> Box:
    assert index is not None
    return tuple(
        part.indices(size)[:2] for part, size in zip(index, shape, strict=True)
    )
