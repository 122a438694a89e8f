"""Small attention problems: every kind of mask, shapes that do not fit tiles."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from ulysses_jax.attention.mask import Mask


@dataclass(frozen=True)
class Case:
    """Sizes by letter, the mask's static part, and its arrays as nested lists."""

    B: int = 2
    T: int = 13
    S: int = 13
    N: int = 4
    K: int = 2
    H: int = 8
    causal: bool = False
    window: int | None = None
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    scale: float | None = None

    @property
    def mask(self) -> Mask:
        arrays = {name: jnp.asarray(x, jnp.int32) for name, x in self.arrays.items()}
        return Mask(causal=self.causal, window=self.window, **arrays)

    def inputs(self, dtype=jnp.float32):
        """q, k, v, and the weights that make a scalar of the output."""
        rng = np.random.default_rng(self.T * 100 + self.S)
        query, key = (self.B, self.T, self.N, self.H), (self.B, self.S, self.K, self.H)
        q, k, v, weights = (
            rng.standard_normal(shape, np.float32) for shape in (query, key, key, query)
        )
        return *(jnp.asarray(x, dtype) for x in (q, k, v)), jnp.asarray(weights)


def both(name, ids):
    """The same ids for queries and keys."""
    return {f"q_{name}": np.asarray(ids), f"kv_{name}": np.asarray(ids)}


LEAST, GREATEST = np.iinfo(np.int32).min, np.iinfo(np.int32).max

# Rows of one batch that are packed differently.
PACKED = both("segment_ids", [[1] * 4 + [2] * 6 + [3] * 3, [1] * 11 + [2] * 2])
SHUFFLED = both("positions", np.random.default_rng(0).permuted([range(13)] * 2, axis=1))
# Two blocks of 4 and two rows: a mix-up of rows and blocks keeps the shapes.
TWO_BY_TWO = both("segment_ids", [[1] * 4 + [2] * 4, [1] * 8])

CASES = {
    "full": Case(),
    "causal": Case(causal=True),
    "window": Case(window=3),
    "causal window": Case(causal=True, window=5),
    "window of one": Case(causal=True, window=1),
    "segments": Case(arrays=PACKED),
    "causal segments": Case(causal=True, arrays=PACKED),
    "two rows, two blocks": Case(T=8, S=8, arrays=TWO_BY_TWO),
    "positions": Case(causal=True, arrays=SHUFFLED),
    "positions window": Case(causal=True, window=4, arrays=SHUFFLED),
    "all at once": Case(causal=True, window=6, arrays=PACKED | SHUFFLED),
    "scale": Case(causal=True, scale=0.3),
    "multi-head": Case(causal=True, K=4),
    "multi-query": Case(causal=True, K=1),
    "cross, few queries": Case(T=5, S=17),
    "cross, few keys": Case(T=17, S=5),
    "cross causal, few queries": Case(T=5, S=17, causal=True),
    "cross causal, few keys": Case(T=17, S=5, causal=True),
    "cross window, few queries": Case(T=5, S=17, causal=True, window=3),
    # Queries that see no key: past the window of the last key, of a lone segment,
    # before every key's position; and a row of the batch with no visible pair at all.
    "blind by window": Case(T=17, S=5, causal=True, window=3),
    "blind by segment": Case(
        arrays={
            "q_segment_ids": np.asarray([[1] * 5 + [7] * 3 + [2] * 5, [9] * 13]),
            "kv_segment_ids": np.asarray([[1] * 6 + [2] * 7, [1] * 13]),
        }
    ),
    "blind by position": Case(
        causal=True,
        arrays={
            "q_positions": np.asarray([range(13), range(-13, 0)]),
            "kv_positions": np.asarray([range(4, 17), range(13)]),
        },
    ),
    # Padding at either end of int32, further from the rest than int32 can say.
    "blind at the ends of int32": Case(
        causal=True,
        window=4,
        arrays={
            "q_positions": np.asarray(
                [[LEAST] * 2 + [*range(low, low + 11)] for low in (0, 5)]
            ),
            "kv_positions": np.asarray([range(13), [*range(5, 16)] + [GREATEST] * 2]),
        },
    ),
}


def out_and_gradients(attend, q, k, v, weights, *sinks):
    """The output and the gradients of a weighted sum of it, jitted."""

    def weighted(*arrays):
        out = attend(*arrays)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    arrays = q, k, v, *sinks
    grad = jax.grad(weighted, argnums=range(len(arrays)), has_aux=True)
    gradients, out = jax.jit(grad)(*arrays)
    return out, *gradients


def assert_close(got, want, tolerance=2e-5):
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=name)
