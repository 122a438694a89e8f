"""The strategies side by side: same model, same length, same global batch."""

import dataclasses
import math
from typing import Any

from ulysses_jax.config import Config
from ulysses_jax.plan.plan import Cluster, degrees_on, make_plan


def compare(config: Config, cluster: Cluster) -> list[dict[str, Any]]:
    """Plans a run under every strategy that exists.

    `unsharded` keeps each sequence on one device (ZeRO over all of them: fsdp takes
    what seq had); `ulysses` is the config's own mesh, or where its seq is 1, seq over
    as much of a host as the heads divide over. The batch is raised, if need be, to what
    both can divide; each computes one sequence of each (data, fsdp) at a time.

    Returns:
      Rows of `strategy`, `mesh`, `fits`, `total_bytes` (a GPU, estimates included),
      `sent_bytes` and `exchange_bytes` (a GPU a step), `step_seconds` and `mfu`
      (predicted), `plan`.
    """
    degrees = degrees_on(config, cluster)
    shards = degrees["seq"] * degrees["ring"]
    unsharded = degrees | {"fsdp": degrees["fsdp"] * shards, "seq": 1, "ring": 1}
    ulysses = degrees
    if degrees["seq"] == 1:
        axis = "fsdp" if degrees["fsdp"] > 1 else "data"
        heads = config.model.num_heads // degrees["tensor"]
        host = max(cluster.gpus_per_host // degrees["tensor"], 1)
        seq = math.gcd(degrees[axis], host, heads)
        ulysses = degrees | {"seq": seq, axis: degrees[axis] // seq}
    rows = unsharded["data"] * unsharded["fsdp"]
    training = dataclasses.replace(
        config.training,
        batch_size=math.lcm(config.training.batch_size, rows),
        accumulation_steps=None,
    )
    found = []
    for strategy, mesh in (("unsharded", unsharded), ("ulysses", ulysses)):
        run = dataclasses.replace(
            config,
            training=training,
            mesh=dataclasses.replace(config.mesh, **mesh),
        )
        plan = make_plan(run, cluster)
        memory = plan["memory"]
        found.append(
            {
                "strategy": strategy,
                "mesh": plan["mesh"],
                "fits": plan["fits"],
                "total_bytes": memory["device_bytes"] + memory["estimated_bytes"],
                "sent_bytes": sum(row["bytes"] for row in plan["traffic"]),
                "exchange_bytes": sum(
                    row["bytes"]
                    for row in plan["traffic"]
                    if (row["collective"], row["axis"]) == ("all-to-all", "seq")
                ),
                "step_seconds": plan["predicted"]["step_seconds"],
                "mfu": plan["predicted"]["mfu"],
                "plan": plan,
            }
        )
    return found
