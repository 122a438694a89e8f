"""`memory: auto` of a run: compiled and measured on the devices that are here."""

import dataclasses
import os

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from ulysses_jax.config import Config
from ulysses_jax.memory.auto import Fit, choose, describe
from ulysses_jax.mesh import platform_of
from ulysses_jax.models.transformer import Transformer
from ulysses_jax.training.model import MakeModel
from ulysses_jax.training.state import abstract_state
from ulysses_jax.training.step import abstract_batch, jit_train_step


def choose_memory(
    config: Config, mesh: Mesh, make_model: MakeModel = Transformer
) -> tuple[Config, list[str]]:
    """The cheapest rung of `memory.auto` whose compiled step fits, and what was tried.

    A GPU has what its driver lets JAX take; simulated CPU devices, which share their
    host's memory with it, an equal part each. On a pod all processes find the same.

    Args:
      config: placed on the mesh.

    Raises:
      ValueError: nothing fits, with the numbers.

    Cost: compiles the step once for every rung that it tries.
    """

    def compiled(candidate: Config) -> Fit:
        with jax.set_mesh(mesh):
            step = jit_train_step(candidate, platform_of(mesh), make_model)
            state = abstract_state(candidate, make_model)
            step = step.trace(state, abstract_batch(candidate))
            try:
                stats = step.lower().compile().memory_analysis()
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                return dataclasses.replace(
                    limits, device_bytes=limits.device_limit_bytes + 1
                )
        assert stats is not None

        def needed(prefix: str) -> int:
            sizes = (
                getattr(stats, f"{prefix}{kind}_size_in_bytes")
                for kind in ("argument", "temp", "output")
            )
            return sum(sizes) - getattr(stats, f"{prefix}alias_size_in_bytes")

        device, host = needed(""), needed("host_")
        return Fit(device, limits.device_limit_bytes, host, limits.host_limit_bytes)

    limits = _limits(mesh)
    config, trials = choose(config, compiled, limits)
    return config, [f"memory auto: {describe(trial)}" for trial in trials]


def _limits(mesh: Mesh) -> Fit:
    """The least of all processes."""
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    host //= max(jax.local_device_count(), 1)
    stats = mesh.local_devices[0].memory_stats() or {}
    here = np.asarray([stats.get("bytes_limit", host), host])
    if jax.process_count() > 1:
        here = multihost_utils.process_allgather(here).min(axis=0)
    device, host = map(int, here)
    return Fit(0, device, 0, host)
