"""The longest sequence that fits a cluster, found by compiling."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from ulysses_jax.config import Config, Memory
from ulysses_jax.memory.auto import CHUNK_TOKENS, rungs
from ulysses_jax.plan.plan import Cluster, make_plan, placed_on, with_tokens

NUM_DEEP_RUNGS = 5
"""Of `memory.auto`, from the end: one of them reaches farthest."""

MAX_TOKENS = 2**31 - 1
"""Positions are int32."""


def longest(
    config: Config,
    cluster: Cluster,
    *,
    tolerance: float = 0.01,
    on_trial: Callable[[int, dict[str, Any]], Any] = lambda tokens, plan: None,
) -> dict[str, Any]:
    """Brackets the longest sequence between one that fits and one that does not.

    Memory is nearly linear in the length, so each trial is where the line through the
    bracket's ends meets the limit, kept inside the bracket.

    Args:
      tolerance: the bracket's width at the end, as a fraction of the answer.
      on_trial: called with each length and its plan.

    Returns:
      The plan of the longest sequence that was compiled and fits, with
      `longest_tokens`, and `trials`: `tokens`, `fits` and `memory` bytes of each.

    Raises:
      PlanError, ValueError: as `make_plan`; ValueError where not even one block of 128
        tokens a device fits.
    """
    if config.memory.auto:
        given = config.memory
        # Groups of heads stay open, where they are: each length has its own.
        config = dataclasses.replace(placed_on(config, cluster), memory=given)
        found = longest(
            dataclasses.replace(config, memory=_farthest(config, cluster, on_trial)),
            cluster,
            tolerance=tolerance,
            on_trial=on_trial,
        )
        # At that length, the cheapest that still fits.
        tokens = found["longest_tokens"]
        return found | make_plan(with_tokens(config, tokens), cluster)
    # Lengths that every shard divides into whole chunks, or blocks of 128 tokens.
    unit = config.memory.sequence_chunk_tokens or 128
    if config.mesh.seq == -1 or config.mesh.ring == -1:
        unit *= cluster.num_devices
    else:
        unit *= config.mesh.seq * config.mesh.ring
    plans: dict[int, dict[str, Any]] = {}

    def fits(tokens: int) -> bool:
        if tokens not in plans:
            plans[tokens] = make_plan(with_tokens(config, tokens), cluster)
            on_trial(tokens, plans[tokens])
        return plans[tokens]["fits"]

    most = MAX_TOKENS // unit * unit
    tokens = min(max(config.training.sequence_tokens // unit, 1) * unit, most)
    low, high, leap = 0, 0, 1
    while not low:
        if fits(tokens):
            low = tokens
        elif tokens == unit:
            memory = plans[unit]["memory"]
            needed = memory["device_bytes"] + memory["estimated_bytes"]
            raise ValueError(
                f"not even {unit:,} tokens fit {cluster.name}: {needed:,} bytes a GPU "
                f"of {memory['limit_bytes']:,}, {memory['host_bytes_per_node']:,} a "
                f"host of {memory['host_limit_bytes_per_node']:,}; "
                f"{plans[unit]['advice']}"
            )
        else:
            high = tokens
            # Where the line misleads, ever longer leaps.
            tokens = min(_meet(plans[high], high), high // leap, high - unit)
            tokens = max(tokens // unit, 1) * unit
            leap = max(leap, 2) ** 2
    while not high and low < most:
        # Over the line, to meet a length that does not fit.
        tokens = min(max(int(1.1 * _meet(plans[low], low)), 2 * low), 16 * low, most)
        tokens = tokens // unit * unit
        if fits(tokens):
            low = tokens
        else:
            high = tokens
    while high and high - low > max(unit, tolerance * low):
        width = high / low
        # On either side of the line, so that both ends move; and where that did not
        # halve the bracket, in its middle: of ratios, for it may be wide.
        for factor in (1 - tolerance / 3, 1 + tolerance / 3, None):
            if factor is not None:
                aim = factor * _between(plans[low], plans[high], low, high)
            elif high / low > math.sqrt(width):
                aim = max(math.sqrt(low * high), low + unit)
            else:
                break
            tokens = int(aim) // unit * unit
            if low < tokens < high:
                low, high = (tokens, high) if fits(tokens) else (low, tokens)
    trials = [
        {
            "tokens": tokens,
            "fits": plan["fits"],
            "device_bytes": plan["memory"]["device_bytes"],
            "host_bytes_per_device": plan["memory"]["host_bytes_per_device"],
        }
        for tokens, plan in sorted(plans.items())
    ]
    return plans[low] | {"longest_tokens": low, "trials": trials}


def _farthest(config: Config, cluster: Cluster, on_trial: Callable[..., Any]) -> Memory:
    """The rung of `memory.auto` whose line, from one length, meets its limit last."""
    tokens = CHUNK_TOKENS * config.mesh.ring * config.mesh.seq
    tokens *= max(config.training.sequence_tokens // tokens, 1)
    probe = with_tokens(config, tokens)
    reach: dict[Memory, int] = {}
    for _, memory in rungs(probe)[-NUM_DEEP_RUNGS:]:
        plan = make_plan(dataclasses.replace(probe, memory=memory), cluster)
        on_trial(tokens, plan)
        reach[memory] = _meet(plan, tokens)
    return max(reach, key=lambda memory: reach[memory])


def _loads(plan: dict[str, Any]) -> tuple[tuple[float, float], ...]:
    """Of GPU and host: how full it is, and how full without tokens; 1 is full."""
    memory = plan["memory"]
    names = ("parameters", "optimizer", "gradients", "estimated")
    state = sum(memory[f"{name}_bytes"] for name in names)
    device = memory["device_bytes"] + memory["estimated_bytes"]
    host = memory["host_bytes_per_node"] / memory["host_limit_bytes_per_node"]
    limit = memory["limit_bytes"]
    return ((device / limit, state / limit), (host, 0.0))


def _meet(plan: dict[str, Any], tokens: int) -> int:
    """Where the first line from the state alone, at no tokens, meets its limit."""
    return int(
        min(
            tokens * max(1 - state, 0) / max(load - state, 1e-6)
            for load, state in _loads(plan)
        )
    )


def _between(
    below: dict[str, Any], above: dict[str, Any], low: int, high: int
) -> float:
    """Where the first line through two plans meets its limit."""
    return min(
        low + (high - low) * (1 - start) / max(end - start, 1e-9)
        for (start, _), (end, _) in zip(_loads(below), _loads(above), strict=True)
    )
