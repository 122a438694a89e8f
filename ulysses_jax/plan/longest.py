"""The longest sequence that fits a cluster, found by compiling."""

from collections.abc import Callable
from typing import Any

from ulysses_jax.config import Config
from ulysses_jax.plan.plan import Cluster, make_plan, with_tokens

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
    # Lengths that every shard divides into whole blocks of 128 tokens.
    unit = 128 * max(config.mesh.seq, 1) * max(config.mesh.ring, 1)
    if config.mesh.seq == -1 or config.mesh.ring == -1:
        unit = 128 * cluster.num_devices
    plans: dict[int, dict[str, Any]] = {}

    def fits(tokens: int) -> bool:
        if tokens not in plans:
            plans[tokens] = make_plan(with_tokens(config, tokens), cluster)
            on_trial(tokens, plans[tokens])
        return plans[tokens]["fits"]

    tokens = max(config.training.sequence_tokens // unit, 1) * unit
    low, high = 0, 0
    while not low:
        if fits(tokens):
            low = tokens
        elif tokens == unit:
            memory = plans[unit]["memory"]
            raise ValueError(
                f"not even {unit:,} tokens fit {cluster.name}: "
                f"{memory['device_bytes']:,} bytes a GPU of {memory['limit_bytes']:,}; "
                f"{plans[unit]['advice']}"
            )
        else:
            high = tokens
            tokens = max(
                min(_meet(plans[high], high), high - unit) // unit * unit, unit
            )
    while not high:
        # Over the line, to meet a length that does not fit.
        tokens = min(max(int(1.1 * _meet(plans[low], low)), 2 * low), 16 * low)
        tokens = tokens // unit * unit
        if tokens > MAX_TOKENS:
            break
        if fits(tokens):
            low = tokens
        else:
            high = tokens
    while high and (width := high - low) > max(unit, tolerance * low):
        line = _between(plans[low], plans[high], low, high)
        # On either side of the line, so that both ends move; and where that did not
        # halve the bracket, in its middle.
        for tokens in (line - tolerance * line / 3, line + tolerance * line / 3, None):
            if tokens is None:
                if high - low <= width / 2:
                    break
                tokens = (low + high) / 2
            tokens = int(tokens) // unit * unit
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


def _load(plan: dict[str, Any]) -> float:
    """How full the fuller of GPU and host is; 1 is full."""
    memory = plan["memory"]
    device = (memory["device_bytes"] + memory["estimated_bytes"]) / memory[
        "limit_bytes"
    ]
    host = memory["host_bytes_per_node"] / memory["host_limit_bytes_per_node"]
    return max(device, host)


def _meet(plan: dict[str, Any], tokens: int) -> int:
    """Where the line from the state alone, at no tokens, meets the limit."""
    memory = plan["memory"]
    names = ("parameters", "optimizer", "gradients", "estimated")
    fixed = sum(memory[f"{name}_bytes"] for name in names) / memory["limit_bytes"]
    slope = max(_load(plan) - fixed, 1e-6)
    return int(tokens * max(1 - fixed, 0) / slope)


def _between(
    below: dict[str, Any], above: dict[str, Any], low: int, high: int
) -> float:
    """Where the line through two plans meets the limit."""
    step = max(_load(above) - _load(below), 1e-9)
    return low + (high - low) * (1 - _load(below)) / step
