"""A mask as data: causal, window, segments, positions; never a [T, S] array."""

from dataclasses import dataclass, field
from numbers import Integral

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

_INT32 = jnp.iinfo(jnp.int32)


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

    @property
    def is_by_index(self) -> bool:
        """Whether indices alone decide: no segments, no positions of the caller's."""
        return self.q_segment_ids is None and self.q_positions is None

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

    def visible(
        self, q_start: Array | int, num_q: int, kv_start: Array | int, num_kv: int
    ) -> Bool[Array, "B q kv"]:
        """The mask between two ranges of tokens; B is 1 if it is one for all rows."""
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

        return Mask(
            causal=causal,
            window=self.window,
            q_segment_ids=cut(self.q_segment_ids, q_start, num_q),
            kv_segment_ids=cut(self.kv_segment_ids, kv_start, num_kv),
            q_positions=cut(self.q_positions, q_start, num_q),
            kv_positions=cut(self.kv_positions, kv_start, num_kv),
        )

    def block_bounds(self, q_block: int, kv_block: int) -> "BlockBounds":
        """Bounds of every block of queries and of keys, to tell empty tiles apart."""
        return BlockBounds(
            causal=self.causal,
            window=self.window,
            q_positions=_bounds(self.q_positions, q_block),
            kv_positions=_bounds(self.kv_positions, kv_block),
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
