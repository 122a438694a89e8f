"""How fast each kernel is, beside the card's matrix products, measured on the spot."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ulysses_jax.check_gpu.problems import (
    MASKS,
    Heads,
    Kernel,
    Problem,
    arrays,
    both_ways,
    compiled,
    forward,
    shapes,
)
from ulysses_jax.check_gpu.rows import Row, Sizes, Skip
from ulysses_jax.mesh import Device

TIMED_MASKS = "causal", "packed", "window", "sinks", "block-sparse"
ROUNDS = 5
# A round is of several calls where one is short: starting it would count as much.
ROUND_SECONDS = 0.02
# Products of all visible pairs: two forward, five more backward, of which one makes
# the logits anew.
PASSES: dict[str, tuple[Callable[..., Any], int]] = {
    "forward": (forward, 2),
    "forward and backward": (both_ways, 7),
}


def rate_rows(sizes: Sizes) -> list[Row]:
    """The rate that the kernels' stand beside: a product of two square matrices."""
    width = sizes.matmul_width
    like = jax.ShapeDtypeStruct((width, width), jnp.bfloat16)

    def prepare():
        return jax.jit(jnp.matmul).lower(like, like).compile()

    def measure(program):
        a = jax.random.normal(jax.random.key(0), like.shape, like.dtype)
        seconds = seconds_of(lambda: program(a, a))
        return {"ms": seconds * 1e3, "TFLOP/s": 2 * width**3 / seconds / 1e12}

    return [Row("rates", {"product": f"{width}^3, bfloat16"}, None, prepare, measure)]


def timing_rows(device: Device, kernels: dict[str, Kernel], sizes: Sizes) -> list[Row]:
    """Every kernel under every mask at every length, the short ones first."""
    heads, rows, seen = sizes.timed_heads, [], {}
    for tokens in sizes.timed_tokens:
        for mask in TIMED_MASKS:
            problem = MASKS[mask](1, tokens, sizes.timed_span)
            for name, kernel in kernels.items():
                if name == "cudnn in parts":
                    continue
                for which, (passes, products) in PASSES.items():
                    like = shapes(1, tokens, heads)
                    rows.append(
                        Row(
                            "timings",
                            {
                                "kernel": name,
                                "mask": mask,
                                "tokens": tokens,
                                "pass": which,
                            },
                            kernel.lacks(device, *like[:2], problem),
                            partial(
                                compiled, passes(kernel, problem), problem.mask, like
                            ),
                            partial(
                                _time,
                                problem,
                                tokens,
                                heads,
                                products,
                                seen.setdefault((name, mask, which), {}),
                                sizes.longest_call_seconds,
                            ),
                        )
                    )
    return rows


def _time(
    problem: Problem,
    tokens: int,
    heads: Heads,
    products: int,
    shorter: dict[str, float],
    longest_seconds: float,
    program,
) -> dict[str, Any]:
    """Seconds and TFLOP/s, of the pairs that are visible.

    Args:
      shorter: `seconds` and `pairs` of the same at a shorter length; this one's are put
        in their place.
    """
    if shorter:
        expected = shorter["seconds"] * problem.pairs / shorter["pairs"]
        if expected > longest_seconds:
            raise Skip(f"a call would take some {expected:.0f} s")
    inputs = arrays(1, tokens, heads)
    seconds = seconds_of(lambda: program(problem.mask, *inputs))
    shorter.update(seconds=seconds, pairs=problem.pairs)
    flops = 2 * products * problem.pairs * heads.N * heads.H
    return {"ms": seconds * 1e3, "TFLOP/s": flops / seconds / 1e12}


def seconds_of(call: Callable[[], Any]) -> float:
    """The median of `ROUNDS` rounds, after two calls that do not count."""
    jax.block_until_ready(call())
    once = _round(call, 1)
    if once > 1:
        return once
    calls = max(1, min(50, int(ROUND_SECONDS / once)))
    return statistics.median(_round(call, calls) for _ in range(ROUNDS))


def _round(call: Callable[[], Any], calls: int) -> float:
    """Seconds a call: they run one after another, and the device is waited for."""
    started = time.perf_counter()
    result = None
    for _ in range(calls):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - started) / calls
