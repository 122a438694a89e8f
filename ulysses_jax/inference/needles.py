"""Rows of hay with needles in it: keys and values in words, asked for at the end."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from ulysses_jax.data.tokenizer import IGNORED, Tokenizer

FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. "
    "Here we go. There and back again. "
)
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclasses.dataclass(frozen=True)
class Haystack:
    """Makes rows of exactly `num_tokens`: the needles' sentences in the hay, then one
    question a needle that is asked for, with its answer.

    Attributes:
      num_needles: of a row, each with a key of its own.
      ask_all: ask for each, in an order of chance; else for the one at the depth.
    """

    tokenizer: Tokenizer
    hay: Int32[np.ndarray, "n"]
    num_needles: int = 1
    ask_all: bool = False

    def row(
        self, num_tokens: int, depth: float, rng: np.random.Generator
    ) -> tuple[Int32[np.ndarray, "T"], Int32[np.ndarray, "T"]]:
        """Tokens, and labels: the answers', before each of their tokens.

        Args:
          depth: of the first needle in the hay, 0 its start and 1 its end; others lie
            at depths of chance.

        Raises:
          ValueError: a row too short for its needles.
        """
        needles = [_needle(key, rng) for key in _keys(self.num_needles, rng)]
        asked = rng.permutation(self.num_needles) if self.ask_all else [0]
        said = [bare(self.tokenizer, f" {_says(*each)}.") for each in needles]
        before, after = around(self.tokenizer)
        tail: list[int] = []
        answers: list[range] = []
        for index in asked:
            question, answer = self._question(*needles[index])
            start = len(tail) + len(question)
            answers.append(range(start, start + len(answer)))
            tail += [*question, *answer]
        left = num_tokens - len(before) - sum(map(len, said)) - len(tail)
        if left < 1:
            raise ValueError(
                f"rows of {num_tokens} tokens have no room for hay: their "
                f"{len(needles)} needles and {len(answers)} questions take "
                f"{num_tokens - left}: use lengths above that, or fewer needles"
            )
        at = [round(depth * left), *rng.integers(0, left + 1, len(needles) - 1)]
        start = int(rng.integers(len(self.hay)))
        hay = self.hay.take(range(start, start + left), mode="wrap")
        pieces, last = [np.asarray(before, np.int32)], 0
        for index in np.argsort(at, kind="stable"):
            pieces += [hay[last : at[index]], np.asarray(said[index], np.int32)]
            last = at[index]
        pieces += [hay[last:], np.asarray(tail, np.int32)]
        tokens = np.concatenate(pieces)
        labels = np.full(num_tokens, IGNORED, np.int32)
        for answer in answers:
            where = np.array(answer) + num_tokens - len(tail)
            labels[where - 1] = tokens[where]
        return tokens, labels

    def _question(self, key: str, value: str) -> tuple[list[int], list[int]]:
        """The ids up to the answer, and the answer's."""
        said = bare(self.tokenizer, f" {_says(key, value)}")
        asked = bare(self.tokenizer, f" {_says(key, '')}".rstrip())
        start = _common(said, asked)
        return said[:start], said[start:]


def filler(tokenizer: Tokenizer) -> Int32[np.ndarray, "n"]:
    return np.array(bare(tokenizer, FILLER), np.int32)


def bare(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids without those that the tokenizer puts around every text."""
    before, after = around(tokenizer)
    ids = tokenizer.encode(text)
    return ids[len(before) : len(ids) - len(after)]


def around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after every text."""
    nothing, one = tokenizer.encode(""), tokenizer.encode("a")
    before = _common(nothing, one)
    return nothing[:before], nothing[before:]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids the two begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    differ = (i for i, (a, b) in pairs if a != b)
    return next(differ, min(len(one), len(other)))


def _says(key: str, value: str) -> str:
    return f"The pass key of {key} is {value}"


def _keys(num: int, rng: np.random.Generator) -> list[str]:
    """Names of four letters, all different."""
    keys: dict[str, None] = {}
    while len(keys) < num:
        letters = [rng.choice(list(part)) for part in 2 * (_CONSONANTS, _VOWELS)]
        keys["".join(letters)] = None
    return list(keys)


def _needle(key: str, rng: np.random.Generator) -> tuple[str, str]:
    return key, str(rng.integers(10_000, 100_000))
