"""A run of several lengths: the longest is compiled, the others are reckoned."""

import dataclasses
from functools import partial
from typing import Any

from ulysses_jax.config import Config, Data
from ulysses_jax.costs.head_chunks import place_on
from ulysses_jax.costs.predict import model_flops_of, step_flops
from ulysses_jax.plan.plan import Cluster, placed_on
from ulysses_jax.training.by_length import configs_by_length


def longest_alone(config: Config) -> Config:
    """The run as if all of its rows were of the longest length, of one document each;
    one without `data.lengths` as it is."""
    if not config.data.lengths:
        return config
    plain = Data()
    data = dataclasses.replace(
        config.data,
        lengths=plain.lengths,
        curriculum=plain.curriculum,
        cycle_steps=plain.cycle_steps,
        mask_documents=False,
    )
    return dataclasses.replace(config, data=data)


def lengths_on(config: Config, cluster: Cluster) -> list[dict[str, Any]]:
    """The steps of each of `data.lengths` on a cluster, from the shortest on.

    Returns:
      `tokens` of a row, `rows` of a step, `mesh`, `strategy`, and by formula the step's
      `model_flops` over all GPUs and which part of them attention takes,
      `attention_fraction`.

    Raises:
      ValueError: as `placed_on` and `configs_by_length`.
    """
    placed = placed_on(config, cluster)
    place = partial(
        place_on, target=cluster.target, gpus_per_host=cluster.gpus_per_host
    )
    found = []
    for tokens, each in configs_by_length(config, placed, place).items():
        flops = step_flops(each, tokens)
        total = model_flops_of(flops)
        found.append(
            {
                "tokens": tokens,
                "rows": each.training.batch_size,
                "mesh": dataclasses.asdict(each.mesh),
                "strategy": each.model.strategy,
                "model_flops": total,
                "attention_fraction": flops["attention"] / total,
            }
        )
    return found
