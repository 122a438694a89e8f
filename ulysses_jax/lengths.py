"""Rows of several lengths as a config has them: `data.lengths`."""

from collections.abc import Sequence

from ulysses_jax.config import Data, Training


def divisor_near(tokens: int, size: int, least: int = 1) -> int | None:
    """Of those that divide `tokens` and are `least` or more the nearest to a size, a
    smaller one first; None: none is."""
    fits = [n for n in range(max(least, 1), tokens + 1) if tokens % n == 0]
    return min(fits, key=lambda n: (n > size, abs(n - size)), default=None)


def check_powers(lengths: Sequence[int]) -> None:
    """Refuses lengths that are not rising powers of 2.

    Raises:
      ValueError: with some that are.
    """
    are_powers = all(each > 0 and each & (each - 1) == 0 for each in lengths)
    if not lengths or not are_powers or sorted(set(lengths)) != list(lengths):
        raise ValueError(
            f"lengths {tuple(lengths)} are not rising powers of 2: use some such as "
            "256, 512, 1024, 2048, 4096, 8192"
        )


def check_lengths(data: Data, training: Training) -> None:
    """Refuses `data.lengths` beside what it excludes, and its options without it.

    Raises:
      ValueError: by the fields' names, with a remedy.
    """
    if not data.lengths:
        for name in ("curriculum", "cycle_steps"):
            value = getattr(data, name)
            if value != getattr(Data(), name):
                raise ValueError(
                    f"data.{name} {value} is of data.lengths, and there are none: give "
                    "lengths, or leave it out"
                )
        return
    try:
        check_powers(data.lengths)
    except ValueError as error:
        raise ValueError(f"data.{error}") from None
    longest, tokens = data.lengths[-1], training.sequence_tokens
    if longest != tokens:
        batch = max(training.batch_size * tokens // longest, 1)
        raise ValueError(
            f"data.lengths end with {longest}, and training.sequence_tokens is "
            f"{tokens}: the longest row is what the mesh and validation are for; set "
            f"training.sequence_tokens {longest} and training.batch_size {batch}"
        )
    if data.packing != "stream":
        raise ValueError(
            f"data.packing {data.packing} puts several documents into a row, and a row "
            "of data.lengths is of one: leave one of them out"
        )
    if data.balance:
        raise ValueError(
            "data.balance deals rows of unequal work, and a step of data.lengths has "
            "rows of one document and one length, which are the same work: leave "
            "data.balance out"
        )
    if data.mixture:
        raise ValueError(
            "data.mixture draws rows by corpus, and data.lengths by length: give "
            "data.files one folder that has all corpora, or leave one of the two out"
        )
