"""Which length a step has, and which rows of it: by the seed and the step alone."""

import hashlib
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Int8, Int64

from ulysses_jax.config import Curriculum


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

    A pass takes the batches of all buckets once. Laid out evenly, pass after pass, they
    are cut into cycles, so that each has every bucket's share. In a cycle every batch
    that is left is drawn with its length's odds, so the short ones run out first, and
    lengths grow once (with cycles shorter than a pass again and again: cyclic). Each
    bucket's rows are taken in a stream of shuffled epochs, cut into batches: none comes
    again before all have come.

    `at(step)` follows from the arguments and the step alone: a checkpoint needs the
    step, and resumes on any mesh.

    Args:
      num_rows: of each length, in tokens; lengths without rows are never drawn.
      tokens_a_step: a multiple of every length.
      curriculum: of `odds`.
      cycle_steps: of a cycle; None: of a pass. The paper has up to 8 in a pass.
      seed: any integer.

    Attributes:
      steps_a_pass: over all lengths. A bucket has as many batches in a pass as its rows
        fill, rounded down, and at least one; what is over begins the next pass.
      cycle_steps: of a cycle.

    Raises:
      ValueError: no rows, or lengths that do not divide tokens_a_step.

    Cost: of a pass and two cycles a byte a step, and of two epochs of each bucket 8
    bytes a row; a sort where a cycle begins, a shuffle where an epoch does.

    Source: arXiv 2405.13226. There a bucket's chance falls when it is empty; here with
    each batch that it gives, so that lengths change more smoothly.
    """

    def __init__(
        self,
        num_rows: dict[int, int],
        tokens_a_step: int,
        *,
        curriculum: Curriculum = "grow-p2",
        cycle_steps: int | None = None,
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
        if cycle_steps is not None and cycle_steps < 1:
            raise ValueError(f"a cycle of {cycle_steps} steps has none: use 1 or more")
        self._lengths, self._seed = lengths, seed
        self._batch = [tokens_a_step // length for length in lengths]
        rows = [num_rows[length] for length in lengths]
        steps = [max(n // b, min(n, 1)) for n, b in zip(rows, self._batch, strict=True)]
        self._steps = np.array(steps, np.int64)
        self.steps_a_pass = int(self._steps.sum())
        self.cycle_steps = cycle_steps or self.steps_a_pass
        self._rows = rows
        self._cycle = lru_cache(maxsize=2)(self._draw_cycle)
        self._epoch = lru_cache(maxsize=2 * len(lengths))(self._shuffle_epoch)

    def at(self, step: int) -> Choice:
        """The length and rows of a step, which counts from 0."""
        number, here = divmod(step, self.cycle_steps)
        begin, drawn = self._cycle(number)
        which = int(drawn[here])
        before = int(begin[which]) + int(np.count_nonzero(drawn[:here] == which))
        batch, rows = self._batch[which], self._rows[which]
        at = before * batch
        stop, parts = at + batch, []
        while at < stop:
            epoch, first = divmod(at, rows)
            parts.append(self._epoch(which, epoch)[first : first + stop - at])
            at += len(parts[-1])
        return Choice(self._lengths[which], np.concatenate(parts))

    def num_steps(self, stop: int) -> dict[int, int]:
        """How many of the steps [0, stop) each length has."""
        number, here = divmod(stop, self.cycle_steps)
        begin, drawn = self._cycle(number)
        found = begin + np.bincount(drawn[:here], minlength=len(begin))
        return dict(zip(self._lengths, found.tolist(), strict=True))

    def _shuffle_epoch(self, which: int, epoch: int) -> Int64[np.ndarray, "rows"]:
        length = self._lengths[which]
        return self._random(f"rows {length} {epoch}").permutation(self._rows[which])

    def _draw_cycle(
        self, number: int
    ) -> tuple[Int64[np.ndarray, "lengths"], Int8[np.ndarray, "steps"]]:
        """How many batches each length has before a cycle, and which length each of its
        steps has."""
        first = number * self.cycle_steps
        begin, end = (self._even(n) for n in (first, first + self.cycle_steps))
        batches = np.repeat(np.arange(len(begin), dtype=np.int8), end - begin)
        # Of clocks with these rates each rings first with its rate's share, and next of
        # those that are left.
        random = self._random(f"cycle {number}")
        rings = random.exponential(size=len(batches)) / self._odds[batches]
        return begin, batches[np.argsort(rings)]

    def _even(self, num_steps: int) -> Int64[np.ndarray, "lengths"]:
        """Batches of each length in the first steps, where all are laid out evenly."""
        passes, rest = divmod(num_steps, self.steps_a_pass)
        here = np.bincount(self._pass[:rest], minlength=len(self._steps))
        return passes * self._steps + here

    @cached_property
    def _pass(self) -> Int8[np.ndarray, "steps"]:
        """Which length each step of a pass has, where all are laid out evenly."""
        places = [(np.arange(n) + 0.5) / n for n in self._steps]
        which = np.repeat(np.arange(len(self._steps), dtype=np.int8), self._steps)
        return which[np.argsort(np.concatenate(places), kind="stable")]

    def _random(self, what: str) -> np.random.Generator:
        digest = hashlib.blake2b(f"{what} {self._seed}".encode(), digest_size=16)
        return np.random.default_rng(int.from_bytes(digest.digest()))
