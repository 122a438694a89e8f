"""A mask as data: causal, window, segments, positions; never a [T, S] array."""

from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from ulysses_jax.attention.block_layout import BlockLayout

_INT32 = jnp.iinfo(jnp.int32)


class Places(NamedTuple):
    """What of a layout is here, where that is a part; None: all, in order.

    Attributes:
      heads: int32 `[N]`, the layout's head of every query head.
      q_blocks, kv_blocks: int32 `[B, T / block]`, `[B, S / block]`, the layout's block
        of every block of tokens; alike in every row.
    """

    heads: Int[Array, "N"] | None = None
    q_blocks: Int[Array, "B q"] | None = None
    kv_blocks: Int[Array, "B kv"] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """Which keys a query sees: those that pass every test that is switched on.

    Attributes:
      causal: a key at the query's position or before.
      window: a key fewer than this many positions away.
      q_segment_ids, kv_segment_ids: int32 `[B, T]`, `[B, S]`: a key of the same
        segment.
      q_positions, kv_positions: int32 `[B, T]`, `[B, S]`: what causal and window
        compare; None is 0, 1, 2, ... for both.
      layout: which blocks of keys a block of queries sees, by the order of tokens;
        kernels go by it (`attention.by_layout`).
      places: what of the layout is here.

    Raises:
      ValueError: a window below 1, above int32 or no integer, or only one array of a
        pair.
    """

    causal: bool = field(default=False, metadata=dict(static=True))
    window: int | None = field(default=None, metadata=dict(static=True))
    q_segment_ids: Int[Array, "B T"] | None = None
    kv_segment_ids: Int[Array, "B S"] | None = None
    q_positions: Int[Array, "B T"] | None = None
    kv_positions: Int[Array, "B S"] | None = None
    layout: BlockLayout | None = field(default=None, metadata=dict(static=True))
    places: Places = Places()

    def __post_init__(self):
        if not isinstance(self.causal, bool | np.bool_):
            raise ValueError(f"causal is True or False, not {self.causal!r}")
        if isinstance(self.window, bool) or not isinstance(
            self.window, Integral | None
        ):
            raise ValueError(f"window is a number of tokens, not {self.window!r}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window {self.window} hides every key: use 1 or more")
        if self.window is not None and self.window > _INT32.max:
            raise ValueError(
                f"window {self.window} exceeds int32: use window=None to see every key"
            )
        for name in ("segment_ids", "positions"):
            q, kv = getattr(self, f"q_{name}"), getattr(self, f"kv_{name}")
            if (q is None) != (kv is None):
                raise ValueError(f"give both q_{name} and kv_{name}, or neither")
        if not isinstance(self.layout, BlockLayout | None):
            raise ValueError(
                "layout is a ulysses_jax.attention.block_layout.BlockLayout, not "
                f"{type(self.layout).__name__}"
            )

    @property
    def is_by_index(self) -> bool:
        """Whether indices alone decide: no segments, positions or layout."""
        arrays = self.q_segment_ids, self.q_positions, self.layout
        return all(each is None for each in arrays)

    def of_heads(self, heads: Int[Array, "N"]) -> "Mask":
        """The mask of some of the layout's heads."""
        return replace(self, places=self.places._replace(heads=heads))

    def check(self, q: Array, k: Array) -> None:
        """Raises ValueError where an array is not `[B, T]` or `[B, S]` of q and k."""
        for name, like in (("q", q), ("kv", k)):
            for what in ("segment_ids", "positions"):
                ids = getattr(self, f"{name}_{what}")
                if ids is not None and ids.shape != like.shape[:2]:
                    raise ValueError(
                        f"{name}_{what} has shape {ids.shape}, but there are "
                        f"{like.shape[:2]} (batch, tokens)"
                    )
        if self.layout is not None and self.places.q_blocks is None:
            heads = q.shape[2] if self.places.heads is None else self.layout.num_heads
            self.layout.check(heads, q.shape[1], k.shape[1])

    def without_layout(self) -> "Mask":
        return replace(self, layout=None, places=Places())

    def visible(
        self, q_start: Array | int, num_q: int, kv_start: Array | int, num_kv: int
    ) -> Bool[Array, "B q kv"]:
        """The mask between two ranges of tokens; B is 1 if it is one for all rows.

        Raises:
          ValueError: it has a layout, which may differ by head.
        """
        if self.layout is not None:
            raise ValueError(
                "the mask has a layout of blocks, which may differ by head: take "
                "mask.without_layout().visible(...) and mask.layout.visible()"
            )
        q = self._positions("q", q_start, num_q)[:, :, None]
        kv = self._positions("kv", kv_start, num_kv)[:, None, :]
        seen = jnp.ones((1, num_q, num_kv), bool)
        seen &= _near(self, (q, q), (kv, kv))
        if self.q_segment_ids is not None:
            q_segments = _cut(self.q_segment_ids, q_start, num_q)[:, :, None]
            seen = seen & (
                q_segments == _cut(self.kv_segment_ids, kv_start, num_kv)[:, None, :]
            )
        return seen

    def between(
        self,
        q_start: Array | int,
        num_q: int,
        kv_start: Array | int,
        num_kv: int,
        *,
        causal: bool,
    ) -> "Mask":
        """The mask of some queries and some keys, which are arrays of their own.

        Args:
          causal: of that mask; indices count from 0 in it, positions stay what they
            are.
        """

        def cut(ids, start, size):
            return None if ids is None else _cut(ids, start, size)

        block = 1 if self.layout is None else self.layout.block_tokens
        heads, q_blocks, kv_blocks = self.places
        return Mask(
            causal=causal,
            window=self.window,
            q_segment_ids=cut(self.q_segment_ids, q_start, num_q),
            kv_segment_ids=cut(self.kv_segment_ids, kv_start, num_kv),
            q_positions=cut(self.q_positions, q_start, num_q),
            kv_positions=cut(self.kv_positions, kv_start, num_kv),
            layout=self.layout,
            places=Places(
                heads,
                cut(q_blocks, q_start // block, num_q // block),
                cut(kv_blocks, kv_start // block, num_kv // block),
            ),
        )

    def of_tiles(
        self, q: Int[Array, "tiles"], kv: Int[Array, "tiles"], batch: int
    ) -> "Mask":
        """The mask of tiles of the layout, blocks (q, kv) of this: rows `tiles * B`."""
        assert self.layout is not None
        block = self.layout.block_tokens

        def rows(x):
            return jnp.broadcast_to(x, (len(q), batch, block)).reshape(-1, block)

        def cut(ids, numbers):
            if ids is None:
                return None
            return rows(jnp.moveaxis(ids.reshape(batch, -1, block), 1, 0)[numbers])

        def positions(ids, places, numbers):
            if ids is not None or not (self.causal or self.window):
                return cut(ids, numbers)
            place = numbers if places is None else places[0, numbers]
            return rows((place * block)[:, None, None] + jnp.arange(block))

        return Mask(
            causal=self.causal,
            window=self.window,
            q_segment_ids=cut(self.q_segment_ids, q),
            kv_segment_ids=cut(self.kv_segment_ids, kv),
            q_positions=positions(self.q_positions, self.places.q_blocks, q),
            kv_positions=positions(self.kv_positions, self.places.kv_blocks, kv),
        )

    def block_bounds(self, q_block: int, kv_block: int) -> "BlockBounds":
        """Bounds of every block of queries and of keys, to tell empty tiles apart.

        Where blocks of a layout have places, they are blocks of the layout.
        """

        def positions(ids, places, block):
            if ids is not None or places is None:
                return _bounds(ids, block)
            return places * block, places * block + block - 1

        return BlockBounds(
            causal=self.causal,
            window=self.window,
            q_positions=positions(self.q_positions, self.places.q_blocks, q_block),
            kv_positions=positions(self.kv_positions, self.places.kv_blocks, kv_block),
            q_segments=_bounds(self.q_segment_ids, q_block),
            kv_segments=_bounds(self.kv_segment_ids, kv_block),
            q_block=q_block,
            kv_block=kv_block,
        )

    def _positions(self, name: str, start: Array | int, size: int) -> Array:
        given = getattr(self, f"{name}_positions")
        if given is None:
            return (start + jnp.arange(size))[None]
        return _cut(given, start, size)


@dataclass(frozen=True)
class BlockBounds:
    """The least and greatest position and segment of every block, `[B, blocks]` each.

    A tile of which these say that no query can see a key is empty; one that they let
    pass may still be empty, which costs time and not truth.
    """

    causal: bool
    window: int | None
    q_positions: tuple[Array, Array] | None
    kv_positions: tuple[Array, Array] | None
    q_segments: tuple[Array, Array] | None
    kv_segments: tuple[Array, Array] | None
    q_block: int
    kv_block: int

    def tiles(self, q: Array | int, kv: Array | int) -> Bool[Array, "..."]:
        """Whether tiles (q, kv), block numbers that broadcast, may hold a visible pair.

        A tile counts for all rows of the batch if it does for one.
        """
        # To one shape first: their bounds have the batch in front of it.
        q, kv = jnp.broadcast_arrays(q, kv)
        seen = jnp.ones(q.shape, bool)[None]
        seen &= _near(
            self,
            self._at(self.q_positions, q, self.q_block),
            self._at(self.kv_positions, kv, self.kv_block),
        )
        if self.q_segments is not None:
            q_low, q_high = self._at(self.q_segments, q, 0)
            kv_low, kv_high = self._at(self.kv_segments, kv, 0)
            seen = seen & (q_low <= kv_high) & (kv_low <= q_high)
        return seen.any(axis=0)

    @staticmethod
    def _at(bounds, block, size) -> tuple[Array, Array]:
        if bounds is None:
            return (block * size)[None], (block * size + size - 1)[None]
        return bounds[0][:, block], bounds[1][:, block]


def _near(
    mask: Mask | BlockBounds, q: tuple[Array, Array], kv: tuple[Array, Array]
) -> Bool[Array, "..."] | bool:
    """What causal and window let pass, of ranges of positions (least, greatest)."""
    (q_low, q_high), (kv_low, kv_high) = q, kv
    near = True
    if mask.causal:
        near &= kv_low <= q_high
    if mask.window is not None:
        near &= ~_is_after(q_low, kv_high, mask.window)
        if not mask.causal:
            near &= ~_is_after(kv_low, q_high, mask.window)
    return near


def _is_after(a: Array, b: Array, window: int) -> Bool[Array, "..."]:
    """Whether a - b >= window: a difference that uint32 holds, and int32 may not."""
    return (a > b) & (a.astype(jnp.uint32) - b.astype(jnp.uint32) >= int(window))


def _cut(ids: Array | None, start: Array | int, size: int) -> Array:
    assert ids is not None
    return jax.lax.dynamic_slice_in_dim(ids, start, size, axis=1)


def _bounds(ids: Array | None, block: int) -> tuple[Array, Array] | None:
    if ids is None:
        return None
    blocks = ids.reshape(ids.shape[0], -1, block)
    return blocks.min(axis=-1), blocks.max(axis=-1)
