"""Which length a step has, and which rows of it: by the seed and the step alone."""

import hashlib
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int8, Int64

Curriculum = Literal["uniform", "grow-linear", "grow-p2"]


def odds(curriculum: Curriculum, num_lengths: int) -> tuple[int, ...]:
    """How much more often a batch of each length is drawn than the longest, at first.

    From the shortest on: uniform 1:1:1, grow-linear 3:2:1, grow-p2 4:2:1.

    Source: arXiv 2405.13226, whose lengths are 2^8 to 2^13: grow-p2 is 32:16:8:4:2:1.
    """
    from_longest = range(num_lengths)
    if curriculum == "uniform":
        found = [1 for _ in from_longest]
    elif curriculum == "grow-linear":
        found = [i + 1 for i in from_longest]
    elif curriculum == "grow-p2":
        found = [2**i for i in from_longest]
    else:
        raise ValueError(
            f"curriculum {curriculum!r} is none of uniform, grow-linear, grow-p2"
        )
    return tuple(reversed(found))


class Choice(NamedTuple):
    """A step's rows.

    Attributes:
      length: of each, in tokens.
      rows: their numbers in that length's bucket.
    """

    length: int
    rows: Int64[np.ndarray, "B"]


class LengthSampler:
    """Steps of one length each, all of the same number of tokens.

    A pass takes the batches of all buckets once, in `num_cycles` parts with the same
    share of each bucket: with 1 the lengths grow once a pass, with more again and
    again (cyclic). In a cycle every batch that is left is drawn with its length's odds,
    so the short ones run out first. Each bucket's rows are taken in a stream of
    shuffled epochs, cut into batches: none comes again before all have come.

    `at(step)` follows from the arguments and the step alone: a checkpoint needs the
    step, and resumes on any mesh.

    Args:
      num_rows: of each length, in tokens; lengths without rows are never drawn.
      tokens_a_step: a multiple of every length.
      curriculum: of `odds`.
      num_cycles: in a pass; 8 in the paper.
      seed: any integer.

    Attributes:
      steps_a_pass: over all lengths. A bucket has as many batches in a pass as its rows
        fill, rounded down, and at least one; what is over begins the next pass.

    Raises:
      ValueError: no rows, or lengths that do not divide tokens_a_step.

    Cost: of two passes a byte a step, and of two epochs of each bucket 8 bytes a row;
    a sort where a pass begins, a shuffle where an epoch does.

    Source: arXiv 2405.13226. There a bucket's chance falls when it is empty; here with
    each batch that it gives, so that lengths change more smoothly.
    """

    def __init__(
        self,
        num_rows: dict[int, int],
        tokens_a_step: int,
        *,
        curriculum: Curriculum = "grow-p2",
        num_cycles: int = 1,
        seed: int = 0,
    ):
        lengths = sorted(num_rows)
        self._odds = np.array(odds(curriculum, len(lengths)), float)
        wrong = [length for length in lengths if tokens_a_step % length]
        if wrong:
            raise ValueError(
                f"a step of {tokens_a_step:,} tokens is no whole number of rows of "
                f"{wrong}: use a multiple of {max(lengths):,}"
            )
        if not any(num_rows.values()):
            raise ValueError(
                f"no document gives a row of {lengths} tokens: use shorter lengths, or "
                "longer documents"
            )
        if num_cycles < 1:
            raise ValueError(f"{num_cycles} cycles draw nothing: use 1 or more")
        self._lengths, self._seed, self._num_cycles = lengths, seed, num_cycles
        self._batch = [tokens_a_step // length for length in lengths]
        rows = [num_rows[length] for length in lengths]
        steps = [max(n // b, min(n, 1)) for n, b in zip(rows, self._batch, strict=True)]
        self._steps = np.array(steps, np.int64)
        self.steps_a_pass = int(self._steps.sum())
        self._rows = rows
        self._pass = lru_cache(maxsize=2)(self._draw_pass)
        self._epoch = lru_cache(maxsize=2 * len(lengths))(self._shuffle_epoch)

    def at(self, step: int) -> Choice:
        """The length and rows of a step, which counts from 0."""
        number, here = divmod(step, self.steps_a_pass)
        drawn = self._pass(number)
        which = int(drawn[here])
        before = int(np.count_nonzero(drawn[:here] == which))
        batch, rows = self._batch[which], self._rows[which]
        at = (number * int(self._steps[which]) + before) * batch
        stop, parts = at + batch, []
        while at < stop:
            epoch, first = divmod(at, rows)
            parts.append(self._epoch(which, epoch)[first : first + stop - at])
            at += len(parts[-1])
        return Choice(self._lengths[which], np.concatenate(parts))

    def _shuffle_epoch(self, which: int, epoch: int) -> Int64[np.ndarray, "rows"]:
        length = self._lengths[which]
        return self._random(f"rows {length} {epoch}").permutation(self._rows[which])

    def _draw_pass(self, number: int) -> Int8[np.ndarray, "steps"]:
        """Which length each step of a pass has."""
        cuts = [
            self._steps * i // self._num_cycles for i in range(self._num_cycles + 1)
        ]
        random = self._random(f"pass {number}")
        cycles = []
        for first, last in zip(cuts[:-1], cuts[1:], strict=True):
            batches = np.repeat(
                np.arange(len(self._steps), dtype=np.int8), last - first
            )
            # Of clocks with these rates each rings first with its rate's share, and
            # next of those that are left.
            rings = random.exponential(size=len(batches)) / self._odds[batches]
            cycles.append(batches[np.argsort(rings)])
        return np.concatenate(cycles)

    def _random(self, what: str) -> np.random.Generator:
        digest = hashlib.blake2b(f"{what} {self._seed}".encode(), digest_size=16)
        return np.random.default_rng(int.from_bytes(digest.digest()))
