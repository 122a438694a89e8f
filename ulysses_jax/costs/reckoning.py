"""What each strategy would send for a model on a cluster, by formula alone."""

from typing import Any

from ulysses_jax.config import Config
from ulysses_jax.costs.collectives import share_between_hosts
from ulysses_jax.costs.predict import link_seconds
from ulysses_jax.costs.targets import Target
from ulysses_jax.costs.traffic import received_by
from ulysses_jax.strategies import Strategy


def reckon(config: Config, target: Target, gpus_per_host: int) -> list[dict[str, Any]]:
    """Reckons every strategy that spreads a sequence over as many GPUs as the config.

    Args:
      config: placed; its ring x seq GPUs share a sequence.

    Returns:
      Rows of `strategy`, `ring`, `seq`; `bytes`, `between_hosts_bytes` (a GPU, layer
      and row, forward and backward: `traffic.received_by`), `link_seconds` (of these,
      predicted, nothing hidden under compute), `is_taken` (by this config).
      Empty where one GPU has the sequence.
    """
    model, mesh = config.model, config.mesh
    spread = meshes(mesh.ring * mesh.seq, mesh.tensor, gpus_per_host)
    if model.strategy == "hybrid":
        spread["hybrid"] = (mesh.ring, mesh.seq)
    rows = []
    for strategy, (ring, seq) in spread.items():
        received = received_by(config, strategy, ring=ring, seq=seq)
        total = between = seconds = 0.0
        for (kind, axis), both_ways in received.items():
            sent = sum(both_ways)
            size, stride = (
                (seq, mesh.tensor) if axis == "seq" else (ring, mesh.tensor * seq)
            )
            outside = sent * share_outside(kind, size, stride, gpus_per_host)
            total, between = total + sent, between + outside
            seconds += link_seconds(target, sent - outside, outside)
        rows.append(
            {
                "strategy": strategy,
                "ring": ring,
                "seq": seq,
                "bytes": total,
                "between_hosts_bytes": between,
                "link_seconds": seconds,
                "is_taken": strategy == model.strategy,
            }
        )
    return rows


def share_outside(kind: str, size: int, stride: int, gpus_per_host: int) -> float:
    """The part that goes between hosts, of what a GPU sends over an axis.

    Args:
      kind: of the collective.
      size, stride: of the axis; neighbours on it are `stride` devices apart.
    """
    num_hosts = len({i * stride // gpus_per_host for i in range(size)})
    return share_between_hosts(kind, size, num_hosts)


def meshes(
    shards: int, tensor: int, gpus_per_host: int
) -> dict[Strategy, tuple[int, int]]:
    """(ring, seq) of every strategy that spreads a sequence over `shards` GPUs."""
    if shards == 1:
        return {}
    found: dict[Strategy, tuple[int, int]] = {
        "ulysses": (1, shards),
        "ring": (shards, 1),
    }
    hosts = max(shards * tensor // gpus_per_host, 2)
    if shards % hosts == 0 and shards > hosts:
        found["hybrid"] = (hosts, shards // hosts)
    found["all_gather"] = found["megatron"] = 1, shards
    return found
