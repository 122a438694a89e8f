"""How many pairs of a query and a key a mask leaves, of rows packed with documents.

Documents are taken to end anywhere with the same chance, so that their lengths are
distributed exponentially: two tokens d apart are of one document in exp(-d / m) of all
cases, where m is the mean length.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ulysses_jax.config import Config


@dataclass(frozen=True)
class Pairs:
    """A causal mask, on average.

    Attributes:
      windows: of every layer, how many tokens it sees; None: all.
      document_tokens: the mean length of a document; None: a row is one document.
    """

    windows: tuple[int | None, ...]
    document_tokens: int | None = None

    def visible(self, span: int) -> float:
        """In a row of `span` tokens, summed over layers; a token's own is half a
        pair."""
        return sum(self._visible(span, window) for window in self.windows)

    def fraction(self, span: int) -> float:
        """Of span x span, in the mean of the layers."""
        return self.visible(span) / len(self.windows) / span**2

    def tiles(self, num_blocks: int, block_tokens: int) -> float:
        """Tiles of a row that hold a visible pair, in the mean of the layers: of a
        block of queries its own, and as many before as its first query reaches."""
        total = 0.0
        for window in self.windows:
            reach = num_blocks
            if window is not None:
                reach = min(math.ceil((window - 1) / block_tokens), num_blocks)
            seen = [self._together(block_tokens * k) for k in range(reach)]
            sums = [0.0]
            for each in seen:
                sums.append(sums[-1] + each)
            total += sum(1 + sums[min(i, reach)] for i in range(num_blocks))
        return total / len(self.windows)

    def _visible(self, span: int, window: int | None) -> float:
        seen = span if window is None else min(window, span)
        if self.document_tokens is None:
            return span * seen - seen**2 / 2
        mean = self.document_tokens
        # The integral over d < seen of (span - d) exp(-d / m).
        far = math.exp(-seen / mean)
        return mean * (span - (span - seen) * far) - mean**2 * (1 - far)

    def _together(self, distance: int) -> float:
        if self.document_tokens is None:
            return 1.0
        return math.exp(-distance / self.document_tokens)


def pairs_of(config: Config, windows: Sequence[int | None] | None = None) -> Pairs:
    """Of a run's mask, in all of its layers, or in those that have these windows."""
    packed = config.data.mask_documents
    return Pairs(
        tuple(config.model.windows() if windows is None else windows),
        config.data.document_tokens if packed else None,
    )
