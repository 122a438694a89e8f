"""Planned beside measured, on devices that are there: how true is the plan?"""

import dataclasses
import resource
import statistics
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from ulysses_jax.config import Config
from ulysses_jax.costs.head_chunks import place_on
from ulysses_jax.costs.predict import check_kinds, predict
from ulysses_jax.costs.targets import TARGETS, target_of
from ulysses_jax.mesh import allow_promotion, make_mesh, simulate_cpu_devices
from ulysses_jax.models.kinds import refuse_unknown
from ulysses_jax.plan.compile import PlanError, analyse, compile_on
from ulysses_jax.training.state import init_state
from ulysses_jax.training.step import abstract_batch, jit_train_step

# How far a device's bytes may be from the plan's, of the plan's.
BYTES_APART = 0.1


@allow_promotion()
def check(config: Config, *, num_steps: int = 5) -> dict[str, Any]:
    """Compiles a run for this machine's devices, runs some steps of it, and compares.

    Runs on random tokens, so it needs no corpus, in documents as the plan counts them
    (`data.document_tokens`); the first step is not timed.

    Returns:
      `device`, `plan` (as `compile.analyse`), and `rows` of `what`, `planned`,
      `measured`, `unit`, and `why` where bytes of a device are further apart than
      `BYTES_APART`: the bytes of state and batch on a device; the high-water mark
      of a device's memory (where the backend tells it, as on GPUs; on CPU devices the
      growth of the process is shared out over them); the step's seconds (predicted only
      for a GPU of `TARGETS`).

    Raises:
      ValueError: the mesh or the config does not fit the devices, or as
        `refuse_unknown` and `check_kinds`.
    """
    refuse_unknown(config.model.kinds())
    check_kinds(config.model)
    simulate_cpu_devices(config.run.simulated_cpu_devices)
    mesh = make_mesh(**dataclasses.asdict(config.mesh), axis_type=AxisType.Explicit)
    device = mesh.devices.flat[0]
    target, gpus_per_host = target_of(device), jax.local_device_count()
    config = place_on(config, dict(mesh.shape), target, gpus_per_host)
    program = compile_on(config, mesh)
    plan = analyse(program, target or TARGETS["h100"], gpus_per_host)
    if target is None:  # what fits here is not for an H100 to say
        for name in (
            "fits",
            "free_bytes",
            "limit_bytes",
            "estimated",
            "estimated_bytes",
        ):
            plan["memory"][name] = None
    stats = program.stats

    before = _high_water(mesh)
    with jax.set_mesh(mesh):
        state = jax.jit(partial(init_state, config))()
        batch = _random_batch(config)
        held = sum(
            shard.data.nbytes
            for array in jax.tree.leaves((state, batch))
            for shard in array.addressable_shards
            if shard.device == device
        )
        step = jit_train_step(config, device.platform)
        seconds = []
        for _ in range(num_steps + 1):
            started = time.monotonic()
            try:
                state, metrics = step(state, batch)
                jax.block_until_ready((state, metrics))
            except jax.errors.JaxRuntimeError as error:
                planned = plan["memory"]["device_bytes"]
                raise PlanError(
                    f"planned {planned:,} bytes a device; the step failed: {error}"
                ) from None
            seconds.append(time.monotonic() - started)
    after = _high_water(mesh)
    predicted = predict(config, target, plan)["step_seconds"] if target else None
    is_cpu = device.platform == "cpu"
    planned = plan["memory"]["device_bytes"]
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "num_devices": mesh.size,
        "plan": plan,
        "rows": [
            bytes_row("state and batch on a device", stats["argument_size"], held),
            bytes_row("growth of the process, a device", planned, after - before, None)
            if is_cpu
            else bytes_row("high-water mark of a device", planned, after),
            {
                "what": "a step",
                "planned": predicted,
                "measured": statistics.median(seconds[1:]),
                "unit": "seconds",
            },
        ],
    }


def bytes_row(
    what: str, planned: int, measured: int, apart: float | None = BYTES_APART
) -> dict[str, Any]:
    """A row of `check`, with `why` where they are further apart than this part of what
    was planned. None: any; a device that measures nothing says 0."""
    row = {"what": what, "planned": planned, "measured": measured, "unit": "bytes"}
    if apart is None or not measured or abs(measured - planned) <= apart * planned:
        return row
    why = f"{what}: planned {planned:,} bytes, measured {measured:,}"
    return row | {"why": f"{why}, more than {apart:.0%} apart"}


def _high_water(mesh: Mesh) -> int:
    """The most bytes a device has held; on the CPU, the process, shared out."""
    device = mesh.devices.flat[0]
    if device.platform != "cpu":
        return int((device.memory_stats() or {}).get("peak_bytes_in_use", 0))
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib * 1024 // mesh.size


def _random_batch(config: Config) -> dict[str, jax.Array]:
    """A batch of random tokens, made sharded; all rows have the same documents."""
    shapes = abstract_batch(config)
    like = shapes["tokens"]

    def make():
        return jax.random.randint(
            jax.random.key(0),
            like.shape,
            0,
            config.model.vocab_size,
            jnp.int32,
            out_sharding=like.sharding.spec,
        )

    def spread(row):
        return jax.make_array_from_callback(
            like.shape, like.sharding, lambda at: np.broadcast_to(row, like.shape)[at]
        )

    tokens = jax.jit(make)()
    mean = config.data.document_tokens if config.data.mask_documents else None
    segments, positions = documents(config.padded_tokens(), mean)
    whole = {
        "tokens": tokens,
        "labels": tokens,
        "positions": spread(positions),
        "segment_ids": spread(segments),
    }
    return {name: whole[name] for name in shapes}


def documents(tokens: int, mean: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids and positions of a row of documents; None: it is one.

    Their lengths are those that `pairs.Pairs` expects: quantiles of the exponential
    distribution, in the same order always.
    """
    count = 1 if mean is None else max(round(tokens / mean), 1)
    lengths = -np.log((np.random.default_rng(0).permutation(count) + 0.5) / count)
    ends = np.round(np.cumsum(lengths) / lengths.sum() * tokens).astype(np.int32)
    places = np.arange(tokens, dtype=np.int32)
    segments = np.searchsorted(ends, places, side="right").astype(np.int32)
    return segments, places - np.concatenate(([0], ends))[segments].astype(np.int32)
