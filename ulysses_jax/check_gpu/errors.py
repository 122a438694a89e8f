"""How true each kernel is: out and gradients beside float64's, all of them or some."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ulysses_jax.attention.exact import exact_attention
from ulysses_jax.attention.mask import Mask
from ulysses_jax.attention.mosaic import BLOCK_STEP
from ulysses_jax.attention.reference import dense_mask
from ulysses_jax.check_gpu.problems import (
    MASKS,
    Heads,
    Kernel,
    Problem,
    arrays,
    both_ways,
    compiled,
    shapes,
    sinks,
)
from ulysses_jax.check_gpu.rows import Row, Sizes
from ulysses_jax.mesh import Device

# Root mean square of the error over that of float64's result. One rounding to bfloat16
# is 0.0017, to float16 0.0002; kernels round results, weights and d(logits), of which
# float16 has the small ones with few digits, and make dq and dk of an out that is
# rounded. A scale that is off by some per cent is seen in each of them.
NAMES = "out", "dq", "dk", "dv", "dsinks"
TOLERANCES: dict[str, dict[str, float]] = {
    "bfloat16": dict(zip(NAMES, (0.005, 0.008, 0.008, 0.005, 0.008), strict=True)),
    "float16": dict(zip(NAMES, (0.001, 0.003, 0.003, 0.001, 0.003), strict=True)),
}

# At 128K a few queries alone have an upstream gradient: their dq, and what of dk and dv
# is theirs, are all that there is.
SPOT_MASKS = "causal", "packed", "window", "sinks", "block-sparse"
NUM_SPOTS = 18
ALONE_MASKS = "causal", "packed window"  # of as many key heads as query heads

Oracle = Callable[[], tuple[np.ndarray, ...]]


def error_rows(device: Device, kernels: dict[str, Kernel], sizes: Sizes) -> list[Row]:
    """Every kernel under every mask at small shapes, heads in groups and not; the first
    heads in float16, too."""
    rows = []
    for heads in sizes.error_heads:
        alone = Heads(heads.K, heads.K, heads.H)
        for mask in MASKS:
            rows += _small_rows(device, kernels, sizes, mask, heads, "bfloat16")
        for mask in ALONE_MASKS:
            rows += _small_rows(device, kernels, sizes, mask, alone, "bfloat16")
    for mask in MASKS:
        heads = sizes.error_heads[0]
        rows += _small_rows(device, kernels, sizes, mask, heads, "float16")
    return rows


def _small_rows(
    device: Device,
    kernels: dict[str, Kernel],
    sizes: Sizes,
    mask: str,
    heads: Heads,
    dtype: str,
) -> list[Row]:
    """Those of one problem."""
    step = BLOCK_STEP if mask == "block-sparse" else 1
    tokens = sizes.error_tokens // step * step
    problem = MASKS[mask](2, tokens, sizes.error_span)
    asked = _Asked(problem, 2, tokens, heads, dtype)
    return _rows("errors", device, kernels, mask, asked)


def spot_rows(device: Device, kernels: dict[str, Kernel], sizes: Sizes) -> list[Row]:
    """Every kernel at the greatest length, at the queries `_spots`."""
    tokens, rows = sizes.spot_tokens, []
    spots = _spots(tokens, sizes.spot_span)
    for mask in SPOT_MASKS:
        problem = MASKS[mask](1, tokens, sizes.spot_span)
        asked = _Asked(problem, 1, tokens, sizes.spot_heads, "bfloat16", spots)
        rows += _rows("spots", device, kernels, mask, asked)
    return rows


class _Asked(NamedTuple):
    """Arrays to attend to under a mask; spots: the queries that have an upstream
    gradient, None: all."""

    problem: Problem
    batch: int
    tokens: int
    heads: Heads
    dtype: str
    spots: tuple[int, ...] | None = None

    def inputs(self) -> tuple[Array, ...]:
        q, k, v, upstream = arrays(self.batch, self.tokens, self.heads, self.dtype)
        if self.spots is not None:
            at = jnp.asarray(self.spots)
            upstream = jnp.zeros_like(upstream).at[:, at].set(upstream[:, at])
        return q, k, v, upstream


def _rows(
    table: str, device: Device, kernels: dict[str, Kernel], mask: str, asked: _Asked
) -> list[Row]:
    problem, batch, tokens, heads, dtype, _ = asked
    want, rows = cache(partial(_exact, asked, device)), []
    for name, kernel in kernels.items():
        like = shapes(batch, tokens, heads, dtype)
        columns = {
            "kernel": name,
            "mask": mask,
            "dtype": dtype,
            "tokens": tokens,
            "heads": f"{heads.N}/{heads.K}",
            "head size": heads.H,
        }
        rows.append(
            Row(
                table,
                columns,
                kernel.lacks(device, *like[:2], problem),
                partial(compiled, both_ways(kernel, problem), problem.mask, like),
                partial(_judge, asked, want),
            )
        )
    return rows


def _spots(tokens: int, span: int) -> tuple[int, ...]:
    """Both ends of a row, of kernels' and a layout's blocks, of a span; others
    anywhere."""
    edges = 64, 128, 512, 1024, span
    some = {0, 1, span + 1, tokens // 2, tokens - 1}
    some |= {at for edge in edges for at in (edge - 1, edge)}
    some = {at for at in some if at < tokens}
    for at in np.random.default_rng(0).permutation(tokens)[:NUM_SPOTS]:
        if len(some) < NUM_SPOTS:
            some.add(int(at))
    return tuple(sorted(some))


def _exact(asked: _Asked, device: Device) -> tuple[np.ndarray, ...]:
    """float64's out, dq, dk, dv; out and dq of the spots alone, where there are any.

    NumPy's on the CPU, a GPU's own on a GPU: a host would take minutes.
    """
    problem, spots = asked.problem, asked.spots
    q, k, v, upstream = asked.inputs()
    if spots is None:
        seen = np.asarray(dense_mask(problem.mask, asked.tokens, asked.tokens)[:, 0])
    else:
        each = [_row_of(problem.mask, at, asked.tokens) for at in spots]
        seen = np.concatenate(each, axis=1)
        at = jnp.asarray(spots)
        q, upstream = q[:, at], upstream[:, at]
    its_sinks = sinks(asked.heads.N) if problem.has_sinks else None
    inputs, exact = (q, k, v, upstream, seen), partial(exact_attention, sinks=its_sinks)
    if not device.is_gpu:
        return exact(*map(np.asarray, inputs))
    with jax.enable_x64(True):
        exact = jax.jit(partial(exact, numpy=jnp))
        return tuple(map(np.asarray, exact(*inputs)))


def _row_of(mask: Mask, at: int, tokens: int) -> np.ndarray:
    """What query `at` sees, bool `[B, 1, S]`; of a layout that is one for all heads."""
    seen = np.asarray(_visible_row(mask.without_layout(), at, tokens))
    if mask.layout is not None:
        size = mask.layout.block_tokens
        seen = seen & mask.layout.blocks[0, at // size].repeat(size)
    return seen


@partial(jax.jit, static_argnums=2)
def _visible_row(mask: Mask, at: int, tokens: int) -> Array:
    return mask.visible(at, 1, 0, tokens)


def _judge(asked: _Asked, want: Oracle, program) -> dict[str, Any]:
    problem, spots = asked.problem, asked.spots
    got = program(problem.mask, *asked.inputs())
    names = NAMES if problem.has_sinks else NAMES[:4]
    got = dict(zip(names, map(np.asarray, got), strict=True))
    if spots is not None:
        at = list(spots)
        others = np.delete(got["dq"], at, axis=1)
        if others.any():  # not a number is not zero
            return {"status": "FAIL", "why": "dq where there is no upstream gradient"}
        got |= {name: got[name][:, at] for name in ("out", "dq")}
    errors = {
        name: relative_error(got[name], exact)
        for name, exact in zip(names, want(), strict=True)
    }
    most = TOLERANCES[asked.dtype]
    # A NaN is below no tolerance.
    bad = [name for name in names if not errors[name] <= most[name]]
    why = ", ".join(f"{name} {errors[name]:.2g} > {most[name]}" for name in bad)
    return errors | ({"status": "FAIL", "why": why} if bad else {})


def relative_error(got: np.ndarray, exact: np.ndarray) -> float:
    error = np.square(got.astype(np.float64) - exact).sum()
    return float(np.sqrt(error / np.square(exact).sum()))
