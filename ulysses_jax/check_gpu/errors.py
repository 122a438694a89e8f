"""How true each kernel is: out and gradients beside float64's, all of them or some."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ulysses_jax.attention.exact import exact_attention
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
# is 0.0017; kernels round results, weights and d(logits), and make dq and dk of an out
# that is rounded. A scale that is off by some per cent is seen in each of them.
TOLERANCES: dict[str, float] = {
    "out": 0.005,
    "dq": 0.008,
    "dk": 0.008,
    "dv": 0.005,
    "dsinks": 0.008,
}
NAMES = tuple(TOLERANCES)

# At 128K a few queries alone have an upstream gradient: their dq, and what of dk and dv
# is theirs, are all that there is.
SPOT_MASKS = "causal", "packed", "window"
NUM_SPOTS = 16

Oracle = Callable[[], tuple[np.ndarray, ...]]


def error_rows(device: Device, kernels: dict[str, Kernel], sizes: Sizes) -> list[Row]:
    """Every kernel under every mask at small shapes, heads in groups and not."""
    batch, rows = 2, []
    for heads in sizes.error_heads:
        alone = Heads(heads.K, heads.K, heads.H)
        for which in (heads, alone):
            for mask in MASKS if which is heads else ("causal", "packed window"):
                step = BLOCK_STEP if mask == "block-sparse" else 1
                tokens = sizes.error_tokens // step * step
                problem = MASKS[mask](batch, tokens, sizes.error_span)
                want = cache(partial(_exact, problem, batch, tokens, which))
                for name, kernel in kernels.items():
                    columns = {"kernel": name, "mask": mask, **_columns(tokens, which)}
                    like = shapes(batch, tokens, which)
                    rows.append(
                        Row(
                            "errors",
                            columns,
                            kernel.lacks(device, *like[:2], problem),
                            partial(
                                compiled, both_ways(kernel, problem), problem.mask, like
                            ),
                            partial(_judge, problem, batch, tokens, which, want),
                        )
                    )
    return rows


def spot_rows(device: Device, kernels: dict[str, Kernel], sizes: Sizes) -> list[Row]:
    """Every kernel at the greatest length, at the queries `_spots`."""
    tokens, heads, rows = sizes.spot_tokens, sizes.spot_heads, []
    for mask in SPOT_MASKS:
        problem = MASKS[mask](1, tokens, sizes.spot_span)
        spots = _spots(tokens, sizes.spot_span)
        want = cache(partial(_exact, problem, 1, tokens, heads, spots))
        for name, kernel in kernels.items():
            like = shapes(1, tokens, heads)
            rows.append(
                Row(
                    "spots",
                    {"kernel": name, "mask": mask, **_columns(tokens, heads)},
                    kernel.lacks(device, *like[:2], problem),
                    partial(compiled, both_ways(kernel, problem), problem.mask, like),
                    partial(_judge, problem, 1, tokens, heads, want, spots=spots),
                )
            )
    return rows


def _columns(tokens: int, heads: Heads) -> dict[str, Any]:
    return {
        "tokens": tokens,
        "heads": f"{heads.N}/{heads.K}",
        "head size": heads.H,
    }


def _spots(tokens: int, span: int) -> tuple[int, ...]:
    """Both ends of a row, of a kernel's blocks and of a span; the others anywhere."""
    some = {0, 1, 63, 64, 127, span - 1, span, span + 1, tokens // 2, tokens - 1}
    some = {at for at in some if at < tokens}
    for at in np.random.default_rng(0).permutation(tokens)[:NUM_SPOTS]:
        if len(some) < NUM_SPOTS:
            some.add(int(at))
    return tuple(sorted(some))


def _inputs(batch, tokens, heads, spots):
    q, k, v, upstream = arrays(batch, tokens, heads)
    if spots is not None:
        at = jnp.asarray(spots)
        upstream = jnp.zeros_like(upstream).at[:, at].set(upstream[:, at])
    return q, k, v, upstream


def _exact(
    problem: Problem, batch, tokens, heads, spots=None
) -> tuple[np.ndarray, ...]:
    """float64's out, dq, dk, dv; out and dq of the spots alone, where there are any."""
    q, k, v, upstream = map(np.asarray, _inputs(batch, tokens, heads, spots))
    mask = problem.mask
    exact = partial(
        exact_attention, sinks=sinks(heads.N) if problem.has_sinks else None
    )
    if spots is None:
        seen = np.asarray(dense_mask(mask, tokens, tokens)[:, 0])
        return exact(q, k, v, upstream, seen)
    visible = jax.jit(lambda mask, at: mask.visible(at, 1, 0, tokens))
    seen = np.concatenate([visible(mask, at) for at in spots], axis=1)
    at = list(spots)
    return exact(q[:, at], k, v, upstream[:, at], seen)


def _judge(
    problem: Problem, batch, tokens, heads, want: Oracle, program, *, spots=None
) -> dict[str, Any]:
    got = program(problem.mask, *_inputs(batch, tokens, heads, spots))
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
    # A NaN is below no tolerance.
    bad = [name for name in names if not errors[name] <= TOLERANCES[name]]
    why = ", ".join(f"{name} {errors[name]:.2g} > {TOLERANCES[name]}" for name in bad)
    return errors | ({"status": "FAIL", "why": why} if bad else {})


def relative_error(got: np.ndarray, exact: np.ndarray) -> float:
    error = np.square(got.astype(np.float64) - exact).sum()
    return float(np.sqrt(error / np.square(exact).sum()))
