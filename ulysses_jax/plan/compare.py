"""The strategies side by side: same model, same length, same global batch."""

import dataclasses
import math
from typing import Any

from ulysses_jax.config import Config
from ulysses_jax.costs.reckoning import meshes
from ulysses_jax.costs.traffic import attention_bytes
from ulysses_jax.plan.plan import Cluster, degrees_on, make_plan, placed_on


def compare(config: Config, cluster: Cluster) -> list[dict[str, Any]]:
    """Plans a run under every strategy that its mesh and model allow.

    `unsharded` keeps each sequence on one device (ZeRO over all of them: fsdp takes
    what ring and seq had); `ulysses` and `all_gather` spread it over seq, as many
    devices as the config does, or where that is 1, as much of a host as the heads
    divide over; so does `megatron`, if key/value heads and feed-forward divide too;
    `ring` spreads it over ring, and `hybrid` over as many members as it has hosts, or
    2. The batch is raised, if need be, to what all can divide; each
    computes one sequence of each (data, fsdp) at a time.

    Returns:
      Rows of `strategy`, `mesh`, `fits`, `total_bytes` (a GPU, estimates included),
      `sent_bytes` and `exchange_bytes` (a GPU a step; those that attention needs),
      `step_seconds` and `mfu` (predicted), `plan`.
    """
    degrees = degrees_on(config, cluster)
    shards = degrees["seq"] * degrees["ring"]
    base = degrees | {"fsdp": degrees["fsdp"] * shards, "seq": 1, "ring": 1}
    axis = "fsdp"
    if shards == 1:
        axis = "fsdp" if degrees["fsdp"] > 1 else "data"
        heads = config.model.num_heads // degrees["tensor"]
        host = max(cluster.gpus_per_host // degrees["tensor"], 1)
        shards = math.gcd(degrees[axis], host, heads)
    training = dataclasses.replace(
        config.training,
        batch_size=math.lcm(config.training.batch_size, base["data"] * base["fsdp"]),
        accumulation_steps=None,
    )
    found = []
    spread = meshes(shards, degrees["tensor"], cluster.gpus_per_host)
    for strategy, (ring, seq) in ({"unsharded": (1, 1)} | spread).items():
        mesh = base | {"ring": ring, "seq": seq, axis: base[axis] // (ring * seq)}
        chosen = "ulysses" if strategy == "unsharded" else strategy
        run = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, strategy=chosen, zigzag=None),
            training=training,
            mesh=dataclasses.replace(config.mesh, **mesh),
        )
        try:
            run = placed_on(run, cluster)
        except ValueError:
            if chosen == "ulysses":
                raise
            continue  # heads in groups or too few, an attention that has no parts
        plan = make_plan(run, cluster)
        memory = plan["memory"]
        found.append(
            {
                "strategy": strategy,
                "mesh": plan["mesh"],
                "fits": plan["fits"],
                "total_bytes": memory["device_bytes"] + memory["estimated_bytes"],
                "sent_bytes": sum(row["bytes"] for row in plan["traffic"]),
                "exchange_bytes": _attention_bytes(plan["traffic"], run),
                "step_seconds": plan["predicted"]["step_seconds"],
                "mfu": plan["predicted"]["mfu"],
                "plan": plan,
            }
        )
    return found


def _attention_bytes(rows: list[dict[str, Any]], config: Config) -> float:
    """What attention sends; where parameters go the same way, its formula's share."""
    formulas = attention_bytes(config)
    total = 0.0
    for row in rows:
        formula = formulas.get((row["collective"], row["axis"]))
        if formula:
            total += row["bytes"] * formula / row["formula_bytes"]
    return total
