"""How many pairs of a query and a key a mask leaves, of rows packed with documents.

Documents are taken to end anywhere with the same chance, so that their lengths are
distributed exponentially: two tokens d apart are of one document in exp(-d / m) of all
cases, where m is the mean length.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ulysses_jax.attention.block_layout import BlockLayout
from ulysses_jax.attention.layouts import layout_of
from ulysses_jax.config import Config


@dataclass(frozen=True)
class Pairs:
    """A causal mask, on average.

    Attributes:
      layers: of every layer, how many tokens it sees (None: all), or its layout.
      document_tokens: the mean length of a document; None: a row is one document.
    """

    layers: tuple[int | None | BlockLayout, ...]
    document_tokens: int | None = None

    def visible(self, span: int) -> float:
        """In a row of `span` tokens, summed over layers; a token's own is half a
        pair."""
        return sum(self._visible(span, layer) for layer in self.layers)

    def fraction(self, span: int) -> float:
        """Of span x span, in the mean of the layers."""
        return self.visible(span) / len(self.layers) / span**2

    def most(self, span: int, members: int) -> float:
        """Of members who have a part each of `span` tokens in their order, how many
        times the mean's pairs the last has."""
        total = last = 0.0
        for layer in self.layers:
            seen = self._visible(span, layer)
            total += seen
            if isinstance(layer, BlockLayout):
                blocks = layer.blocks.shape[1]
                last += self._visible_by_layout(layer, blocks - blocks // members)
            else:
                last += seen - self._visible(span - span // members, layer)
        return members * last / total if total else 1.0

    def tiles(self, num_blocks: int, block_tokens: int) -> float:
        """Tiles of a row that hold a visible pair, in the mean of the layers: of a
        block of queries its own, and as many before as its first query reaches.

        Of layers without a layout.
        """
        total = 0.0
        for window in self.layers:
            assert not isinstance(window, BlockLayout)
            reach = num_blocks
            if window is not None:
                reach = min(math.ceil((window - 1) / block_tokens), num_blocks)
            seen = [self._together(block_tokens * k) for k in range(reach)]
            sums = [0.0]
            for each in seen:
                sums.append(sums[-1] + each)
            total += sum(1 + sums[min(i, reach)] for i in range(num_blocks))
        return total / len(self.layers)

    def layout_tiles(self, rows: int) -> float:
        """Of layers with a layout, tiles of a head that are computed, in the mean:
        those that hold a visible pair of at least one of `rows` rows.

        Where rows are one document each head has as many as that with the most.
        """
        layout = self._layout
        if self.document_tokens is None:
            return max(map(len, layout.tiles(causal=True)))
        counts = _by_distance(layout)
        # Of two blocks, the tokens that are nearest to each other.
        hidden = [
            1 - self._together(layout.block_tokens * d) for d in range(len(counts) - 1)
        ]
        kept = [n * (1 - h**rows) for n, h in zip(counts[1:], hidden, strict=True)]
        return counts[0] + sum(kept)

    def layout_fraction(self, rows: int) -> float:
        """`layout_tiles` of those of the head with the most."""
        return self.layout_tiles(rows) / max(map(len, self._layout.tiles(causal=True)))

    def _visible(self, span: int, window: int | None | BlockLayout) -> float:
        if isinstance(window, BlockLayout):
            return self._visible_by_layout(window)
        seen = span if window is None else min(window, span)
        if self.document_tokens is None:
            return span * seen - seen**2 / 2
        mean = self.document_tokens
        # The integral over d < seen of (span - d) exp(-d / m).
        far = math.exp(-seen / mean)
        return mean * (span - (span - seen) * far) - mean**2 * (1 - far)

    def _visible_by_layout(self, layout: BlockLayout, first_block: int = 0) -> float:
        """Of a head, in the mean, from a block of queries on. A tile is as far away as
        its first tokens are."""
        size, counts = layout.block_tokens, _by_distance(layout, first_block)
        away = [n * self._together(size * d) for d, n in enumerate(counts)][1:]
        return counts[0] * self._visible(size, None) + sum(away) * size**2

    @property
    def _layout(self) -> BlockLayout:
        return next(layer for layer in self.layers if isinstance(layer, BlockLayout))

    def _together(self, distance: int) -> float:
        if self.document_tokens is None:
            return 1.0
        return math.exp(-distance / self.document_tokens)


def _by_distance(layout: BlockLayout, first_block: int = 0) -> np.ndarray:
    """How many tiles a head has, in the mean, by how many blocks lie between; of its
    queries from a block on."""
    lists = layout.tiles(causal=True)
    tiles = np.concatenate(lists)
    tiles = tiles[tiles[:, 0] >= first_block]
    return np.bincount(tiles[:, 0] - tiles[:, 1]) / len(lists)


def pairs_of(config: Config, kinds: Sequence[str] | None = None) -> Pairs:
    """Of a run's mask, in all layers that attend, or in one of each of these kinds."""
    model, packed = config.model, config.data.mask_documents
    sees: dict[str, int | None | BlockLayout] = {"window": model.window}
    if model.sparse is not None:
        sees["sparse"] = layout_of(model, config.padded_tokens())
    return Pairs(
        tuple(map(sees.get, model.attending_kinds() if kinds is None else kinds)),
        config.data.document_tokens if packed else None,
    )
