"""Steps of several lengths: each on its own split of the devices, the state in place.

The devices that spread a row of the longest length (fsdp x ring x seq, in one order)
are shared out anew for each length: short rows take fewer of them each, and more rows
stand beside each other. Parameters and moments are cut over all three axes together, so
each device has the same part of them under every split, and none is moved.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

from ulysses_jax.config import Config, Memory
from ulysses_jax.data.loader import (
    Batches,
    Layout,
    Order,
    batches_in_order,
    shuffled_order,
)
from ulysses_jax.data.open import RunData
from ulysses_jax.memory.offload import check_offload, memory_stats
from ulysses_jax.mesh import make_mesh, platform_of
from ulysses_jax.training.arrays import on_devices
from ulysses_jax.training.model import MakeModel
from ulysses_jax.training.state import TrainState, abstract_state, host_bytes
from ulysses_jax.training.step import (
    Batch,
    Metrics,
    abstract_batch,
    batch_shape,
    batch_spec,
    jit_train_step,
)


class Split(NamedTuple):
    """A step's length as a config, placed on its mesh."""

    config: Config
    mesh: Mesh

    def layout(self) -> Layout:
        """How a batch lies."""
        sharding = NamedSharding(self.mesh, batch_spec(self.mesh))
        members = self.config.zigzag_members()
        return Layout(batch_shape(self.config), sharding, members)


def configs_by_length(
    config: Config,
    placed: Config,
    place: Callable[[Config, dict[str, int]], Config],
) -> dict[int, Config]:
    """A placed config of each of `data.lengths`; of a run without them one.

    A length's rows are spread over the least of ring x seq that leaves every group of
    devices the same number of rows, and that of the longest as the config says. All
    have the same tokens a step, in as many accumulation steps.

    Args:
      config: complete, before it is placed.
      placed: the same on its mesh.
      place: as `placement.place`.

    Returns:
      By the tokens of a row as padded to the mesh, from the shortest on.

    Raises:
      ValueError: a length that the mesh cannot split, by its number; or as `place`.
    """
    lengths = config.data.lengths
    if not lengths:
        return {placed.padded_tokens(): placed}
    data = dataclasses.replace(config.data, mask_documents=False)
    found = {}
    for length in lengths:
        degrees = _degrees(placed, length)
        training = dataclasses.replace(
            placed.training,
            sequence_tokens=length,
            batch_size=_batch_size(placed, length),
        )
        try:
            found[length] = place(
                dataclasses.replace(config, data=data, training=training), degrees
            )
        except ValueError as error:
            raise ValueError(f"data.lengths {length}: {error}") from None
        if found[length].padded_tokens() != length:
            raise ValueError(
                f"data.lengths {length} does not divide over mesh.ring "
                f"{degrees['ring']} x mesh.seq {degrees['seq']} (in zigzag order, into "
                "half-blocks of even length): use degrees that are powers of 2, or "
                "leave that length out"
            )
    return found


def _batch_size(placed: Config, length: int) -> int:
    training = placed.training
    return training.batch_size * training.sequence_tokens // length


def _degrees(placed: Config, length: int) -> dict[str, int]:
    """The mesh of a length."""
    mesh, degrees = placed.mesh, vars(placed.mesh)
    if length == placed.training.sequence_tokens:
        return degrees
    context = mesh.fsdp * mesh.ring * mesh.seq
    parts = mesh.data * (placed.training.accumulation_steps or 1)
    # The longest's own split, the last of them, divides the rows of every length.
    ring, seq = next(
        (ring, seq)
        for ring, seq in sorted(
            product(_divisors(mesh.ring), _divisors(mesh.seq)),
            key=lambda each: (each[0] * each[1], each),
        )
        if _batch_size(placed, length) % (parts * context // (ring * seq)) == 0
    )
    return degrees | dict(fsdp=context // (ring * seq), ring=ring, seq=seq)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def splits_of(configs: Mapping[int, Config], mesh: Mesh) -> dict[int, Split]:
    """The lengths' configs on their own meshes of the devices of `mesh`."""

    def own(config: Config) -> Mesh:
        degrees = dataclasses.asdict(config.mesh)
        if degrees == dict(mesh.shape):
            return mesh
        devices = list(mesh.devices.flat)
        return make_mesh(**degrees, devices=devices, axis_type=AxisType.Explicit)

    return {tokens: Split(config, own(config)) for tokens, config in configs.items()}


def refuse_moves(splits: Mapping[int, Split], make_model: MakeModel) -> None:
    """Refuses lengths between which a part of the state would have to be moved.

    Raises:
      ValueError: names the first, both meshes, and what would leave it in place.
    """
    (longest, (config, mesh)), *others = reversed(sorted(splits.items()))
    if not others:
        return
    there = _places(splits[longest], make_model)
    for tokens, split in others:
        for (path, x), (_, y) in zip(_places(split, make_model), there, strict=True):
            if x.sharding.is_equivalent_to(y.sharding, x.ndim):
                continue
            degrees = [
                " x ".join(f"{a}={n}" for a, n in each.shape.items() if n > 1)
                for each in (split.mesh, mesh)
            ]
            shared = config.mesh.fsdp * config.mesh.ring * config.mesh.seq
            raise ValueError(
                f"data.lengths {tokens} on mesh {degrees[0]} and {longest} on "
                f"{degrees[1]} have state{jax.tree_util.keystr(path)} in different "
                f"places, {x.sharding.spec} and {y.sharding.spec}: parameters stay "
                f"where they are if fsdp x ring x seq, {shared} devices, divide "
                "model.width (a module's own: if they are whole, or cut over these "
                "three axes), and model.strategy is not megatron; or use mesh.ring 1 "
                "and mesh.seq 1"
            )


def _places(split: Split, make_model: MakeModel) -> list[tuple[Any, Any]]:
    """Where each array of the state lies, by its path."""
    with jax.set_mesh(split.mesh):
        shapes = jax.tree.map(on_devices, abstract_state(split.config, make_model))
    return jax.tree.flatten_with_path(shapes)[0]


def with_memory(splits: Mapping[int, Split], memory: Memory) -> dict[int, Split]:
    """The same with the memory options chosen for the longest; each length keeps its
    own groups of heads, where these leave it any."""

    def own(config: Config) -> Config:
        chunks = min(config.memory.head_chunks or 1, memory.head_chunks or 1)
        chosen = dataclasses.replace(memory, head_chunks=chunks)
        return dataclasses.replace(config, memory=chosen)

    return {n: Split(own(each.config), each.mesh) for n, each in splits.items()}


def rows_of_steps(data: RunData, splits: Mapping[int, Split]) -> Order:
    """Which rows each step of a run reads: by (config, data, step) alone.

    Returns:
      `f(step)`, the step from 0 on, of `curriculum.Choice`: the tokens of its rows, and
      their numbers, in the order in which they lie in the batch. With `data.lengths`
      each length's rows are numbered by themselves. It reads no tokens.
    """
    if data.by_length is not None:
        return data.by_length.sampler.at
    ((config, _),) = splits.values()
    return shuffled_order(
        data.train,
        batch_shape(config),
        seed=config.run.seed,
        balanced_groups=config.balanced_groups(),
    )


def training_batches(
    data: RunData, splits: Mapping[int, Split], start_step: int
) -> Batches:
    """The rows of `rows_of_steps`, read ahead: `loader.batches` of a run."""
    if data.by_length is not None:
        rows = data.by_length.rows
        layouts = {tokens: each.layout() for tokens, each in splits.items()}
    else:
        (split,) = splits.values()
        tokens = data.train.sequence_tokens
        rows, layouts = {tokens: data.train}, {tokens: split.layout()}
    order = rows_of_steps(data, splits)
    return batches_in_order(order, rows, layouts, start_step=start_step)


class Steps:
    """The train steps of a run, one a length: traced at once, compiled when asked for.

    Args:
      splits: by the tokens of a row.

    Attributes:
      shapes: of the state where a length's step has it.
      traced, compiled: the steps; those that were asked for.
      seconds: that it took to compile each of these.
    """

    def __init__(self, splits: Mapping[int, Split], make_model: MakeModel):
        self.traced: dict[int, jax.stages.Traced] = {}
        self.compiled: dict[int, jax.stages.Compiled] = {}
        self.shapes: dict[int, TrainState] = {}
        self.seconds: dict[int, float] = {}
        self._splits = splits
        for tokens, (config, mesh) in splits.items():
            with jax.set_mesh(mesh):
                shapes = abstract_state(config, make_model)
                self.shapes[tokens] = jax.tree.map(on_devices, shapes)
                step = jit_train_step(config, platform_of(mesh), make_model)
                self.traced[tokens] = step.trace(shapes, abstract_batch(config))

    def compile(self, tokens: int, say: Callable[[str], Any]) -> None:
        """Compiles the step of a length, unless it is."""
        if tokens in self.compiled:
            return
        config, mesh = self._splits[tokens]
        of = f" of {tokens:,} tokens" if len(self._splits) > 1 else ""
        say(f"compiling the step{of}")
        started = time.monotonic()
        with jax.set_mesh(mesh):
            step = self.traced[tokens].lower().compile()
        needed = host_bytes(config, self.shapes[tokens])
        check_offload(needed, memory_stats(step), platform_of(mesh))
        self.seconds[tokens] = time.monotonic() - started
        say(f"compiled the step{of} in {self.seconds[tokens]:.0f} s")
        self.compiled[tokens] = step

    def __call__(
        self, state: TrainState, batch: Batch, say: Callable[[str], Any]
    ) -> tuple[TrainState, Metrics]:
        """Takes a step of the batch's length; the state may lie as another's left it,
        and is given up."""
        tokens = batch["tokens"].shape[2]
        self.compile(tokens, say)
        if len(self._splits) > 1:
            state = relaid(state, self.shapes[tokens])
        with jax.set_mesh(self._splits[tokens].mesh):
            return self.compiled[tokens](state, batch)


def relaid(tree: Any, like: Any) -> Any:
    """The same arrays on another split of their devices: nothing is copied.

    Args:
      like: shapes with shardings under which each device has the part that it has now.
    """
    return jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), tree, like)
