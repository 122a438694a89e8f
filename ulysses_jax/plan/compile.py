"""Compiles the trainer's own step for GPUs that are not there."""

import dataclasses
import importlib.util
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ulysses_jax.config import Config
from ulysses_jax.costs.collectives import (
    find_collectives,
    moving_loops_of_unknown_trips,
)
from ulysses_jax.costs.flops import attention_flops, matmul_flops
from ulysses_jax.costs.head_chunks import place_on
from ulysses_jax.costs.hlo import parse
from ulysses_jax.costs.kernels import (
    attention_of_kinds,
    kernels_in,
    others_than_chosen,
)
from ulysses_jax.costs.pairs import pairs_of
from ulysses_jax.costs.recurrences import chunk_kernels
from ulysses_jax.costs.targets import Target
from ulysses_jax.costs.traffic import traffic, unexpected
from ulysses_jax.memory.offload import check_offload, memory_stats
from ulysses_jax.mesh import Device, device_of, make_mesh, resolve_degrees
from ulysses_jax.plan.host import host_moves
from ulysses_jax.plan.memory import memory
from ulysses_jax.plan.overlap import copies, overlap
from ulysses_jax.training.state import (
    TrainState,
    abstract_gradients,
    abstract_state,
    host_bytes,
)
from ulysses_jax.training.step import abstract_batch, jit_train_step


class PlanError(ValueError):
    """A plan that cannot be made; the message says why and what to do."""


@dataclass(frozen=True)
class Program:
    """A compiled step."""

    text: str
    """Scheduled HLO."""
    stats: dict[str, int]
    """XLA's memory analysis, bytes, names without "_in_bytes"."""
    config: Config
    """As placed on the mesh."""
    degrees: dict[str, int]
    state: TrainState
    """Abstract, with shardings on the mesh."""
    gradients: dict[str, Any]
    """Likewise, as a step sums them."""
    device: Device
    """What it runs on."""
    compile_seconds: float
    """Tracing, lowering and compiling."""


def compile_step(
    config: Config, target: Target, hosts: int, gpus_per_host: int
) -> Program:
    """Compiles the train step of a run for a cluster, in this process.

    The platform must be the CPU (`JAX_PLATFORMS=cpu`). Where XLA aborts, so does the
    process: `ulysses_jax.plan.worker` has one of its own for each compile.

    Args:
      config: a run; a mesh degree of -1 takes the GPUs that the others leave.

    Raises:
      PlanError: no CUDA plugin; a target that XLA refuses, or a step.
      ValueError: a mesh that does not match the cluster (the message says one that
        does), a config that does not fit its mesh.
    """
    degrees = mesh_degrees(config, target, hosts, gpus_per_host)
    config = place_on(config, degrees, target, gpus_per_host)
    started = time.monotonic()
    mesh = make_mesh(
        **degrees,
        devices=cluster_devices(target, hosts, gpus_per_host),
        axis_type=AxisType.Explicit,
    )
    with _no_persistent_cache():
        return compile_on(config, mesh, started=started)


def compile_on(
    config: Config,
    mesh: Mesh,
    *,
    started: float | None = None,
    compiler_options: dict[str, Any] | None = None,
) -> Program:
    """Compiles the train step on a mesh, of devices that are there or not.

    Args:
      config: placed on the mesh.
      started: `time.monotonic()` from which the seconds count; None: from here.
      compiler_options: XLA's, as `jax.jit` takes them.
    """
    started = time.monotonic() if started is None else started
    device = mesh.devices.flat[0]
    platform = "cuda" if device.platform == "gpu" else device.platform

    def on_mesh(x):
        # Devices that are not there have no memory kinds: only on the abstract mesh
        # can a sharding say that an array lies in host memory.
        if x.sharding is not None:
            return x
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P()))

    with jax.set_mesh(mesh):
        state = jax.tree.map(on_mesh, abstract_state(config))
        gradients = abstract_gradients(config, state)
        batch = abstract_batch(config)
        step = jit_train_step(config, platform)
        lowered = step.trace(state, batch).lower(lowering_platforms=(platform,))
        try:
            compiled = lowered.compile(compiler_options)
        except jax.errors.JaxRuntimeError as error:
            raise PlanError(
                f"XLA cannot compile this step for {device.device_kind}: "
                f"{_first_line(error)}"
            ) from None
    text = compiled.as_text()
    if text is None:
        raise PlanError(f"XLA gives no text of a program for {device.device_kind}")
    stats = memory_stats(compiled)
    check_offload(host_bytes(config, state), stats, platform)
    seconds = time.monotonic() - started
    degrees, device = dict(mesh.shape), device_of(mesh)
    return Program(text, stats, config, degrees, state, gradients, device, seconds)


def analyse(
    program: Program,
    target: Target,
    gpus_per_host: int,
    host_memory_bytes: int | None = None,
) -> dict[str, Any]:
    """All that is read off a program, ready for JSON; quantities are of one GPU a step.

    Returns:
      `mesh`, `num_devices`, `sequence_tokens`, `batch_size`, `compile_seconds`;
      `memory`, `traffic`, `overlap`, `copies`, `host_moves` (see the functions of those
      names); `attention`, what attends in each kind of layer (`attention_of_kinds`),
      and `kernels`, what the program attends with (`kernels_in`); `chunk_kernels`, of
      recurrences (`recurrences.chunk_kernels`); `attention_flops`,
      `matmul_flops` (as compiled, recomputation included); and
      `warnings`: what the program sends beside the formulas, or attends with beside the
      choice; what could not be read.
    """
    config, degrees = program.config, program.degrees
    training = config.training
    assert training.accumulation_steps
    kinds = config.model.attending_kinds()
    by_ranges = [kind for kind in kinds if kind != "sparse"]
    module = parse(
        program.text,
        pairs_of(config, by_ranges) if by_ranges else None,
        pairs_of(config, ("sparse",)) if "sparse" in kinds else None,
    )
    collectives = find_collectives(module, degrees, gpus_per_host)
    entry = module.computations[module.entry]
    layer_runs = config.model.num_layers * training.accumulation_steps
    rows = traffic(collectives, config)
    attention = attention_of_kinds(config, program.device)
    kernels = kernels_in(module)
    moves = host_moves(module)
    movers = {place["name"] for place in moves["places"]}
    return {
        "mesh": degrees,
        "num_devices": math.prod(degrees.values()),
        "sequence_tokens": config.padded_tokens(),
        "batch_size": training.batch_size,
        "compile_seconds": program.compile_seconds,
        "memory": memory(
            program.stats,
            program.state,
            program.gradients,
            module,
            collectives,
            target,
            gpus_per_host,
            host_memory_bytes,
        ),
        "traffic": rows,
        "attention": attention,
        "kernels": kernels,
        "overlap": overlap(module, collectives),
        "copies": copies(module, collectives, layer_runs),
        "host_moves": moves,
        "chunk_kernels": chunk_kernels(module),
        "attention_flops": sum(
            attention_flops(module, entry, each) for each in entry.instructions
        ),
        "matmul_flops": sum(
            matmul_flops(module, entry, each) for each in entry.instructions
        ),
        "warnings": unexpected(rows)
        + others_than_chosen(attention, kernels)
        + [
            f"loop {name} runs a number of times that XLA does not know: counted once"
            for name in moving_loops_of_unknown_trips(module, movers)
        ],
    }


def mesh_degrees(
    config: Config, target: Target, hosts: int, gpus_per_host: int
) -> dict[str, int]:
    """The mesh of a run on a cluster.

    Raises:
      ValueError: it does not match; the message says one that does.
    """
    try:
        return resolve_degrees(dataclasses.asdict(config.mesh), hosts * gpus_per_host)
    except ValueError as error:
        cluster = f"{target.name}:{hosts}x{gpus_per_host}"
        raise ValueError(f"on {cluster}: {error}") from None


def cluster_devices(target: Target, hosts: int, gpus_per_host: int) -> list[Any]:
    """Devices to compile for, none of which needs to exist.

    Raises:
      PlanError: no CUDA plugin is installed, or XLA refuses the target.
    """
    plugins = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
    if not any(_is_installed(plugin) for plugin in plugins):
        raise PlanError(
            "compiling for GPUs needs JAX's CUDA plugin, which is not installed: run "
            "`make plan`, or `pip install 'ulysses-jax[gpu]'`"
        )
    try:
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            topology=f"1x{hosts}x{gpus_per_host}",
            target_config=target.xla_text(),
        )
    except (jax.errors.JaxRuntimeError, ValueError, RuntimeError) as error:
        raise PlanError(
            f"XLA refuses the target {target.name}: {_first_line(error)}"
        ) from None
    return list(topology.devices)


@contextmanager
def _no_persistent_cache() -> Iterator[None]:
    """Without JAX's cache on disk: it writes programs for absent GPUs, and cannot read
    them again ("PjRtCompiler must be constructed with a Client")."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # it remembers that it was in use
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), repr(error))
