"""The train step: one function from a state and a batch to the next state."""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from ulysses_jax.config import Config
from ulysses_jax.models.adapter import joined, part_like
from ulysses_jax.models.transformer import Transformer
from ulysses_jax.sharding import activation
from ulysses_jax.training.loss import cross_entropy, num_valid, training_loss
from ulysses_jax.training.model import (
    MakeModel,
    are_matrices,
    features_and_head,
    model_of,
    own_name,
)
from ulysses_jax.training.optimizer import learning_rate_schedule
from ulysses_jax.training.state import TrainState, lay, optimizer_of
from ulysses_jax.training.update import add, update, zeros_like
from ulysses_jax.weights.gathered import Gathered, Weight

Batch = dict[str, Int[Array, "A B T"]]
Metrics = dict[str, Array]


def batch_shape(config: Config) -> tuple[int, int, int]:
    """The global shape of every array of a batch: [accumulation steps, B, T]."""
    training = config.training
    assert training.accumulation_steps, "placement.place fills it in"
    rows = training.batch_size // training.accumulation_steps
    return training.accumulation_steps, rows, config.padded_tokens()


def batch_spec(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> PartitionSpec:
    """How every array of a batch lies on the mesh."""
    return PartitionSpec(None, *activation("BT", mesh.shape))


def abstract_batch(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch as shapes, dtypes and shardings on the mesh that is set."""
    mesh = jax.sharding.get_mesh()
    array = jax.ShapeDtypeStruct(
        batch_shape(config),
        jnp.int32,
        sharding=NamedSharding(mesh, batch_spec(mesh)),
    )
    names = ["tokens", "labels", "positions"]
    if config.data.mask_documents:
        names.append("segment_ids")
    return dict.fromkeys(names, array)


def jit_train_step(
    config: Config, platform: str, make_model: MakeModel = Transformer
) -> jax.stages.Wrapped:
    """`make_train_step` jitted as a run has it: the state donated, XLA's options set.

    Args:
      platform: of the devices that it is for, "gpu", "cuda" or "cpu".
    """
    return jax.jit(
        make_train_step(config, make_model),
        donate_argnums=0,
        compiler_options=xla_options(config, platform),
    )


# By default one collective is in flight at a time: a sum of gradients between hosts
# holds up every exchange inside them. And beyond four fifths of a GPU's memory XLA
# hides no collective, and computes and exchanges again what it could keep: 125 % of
# these, less a quarter of what the step's arguments take, is all.
_OPTIONS = {
    "xla_gpu_experimental_parallel_collective_overlap_limit": 2,
    "xla_gpu_memory_limit_slop_factor": 125,
}


def xla_options(config: Config, platform: str) -> dict[str, int]:
    """The options of XLA that a run's step is compiled with; XLA_FLAGS win over them.

    On GPUs two collectives may be in flight, and all memory be taken; not in chunks of
    the sequence, where that hides no more and takes memory. `docs/gpu.md` has the
    figures.
    """
    is_gpu = platform in ("gpu", "cuda")
    if not is_gpu or config.memory.sequence_chunk_tokens:
        return {}
    given = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in _OPTIONS.items() if name not in given}


def make_train_step(
    config: Config, make_model: MakeModel = Transformer
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Makes the step of a run, not jitted: `jit_train_step` does.

    A batch holds `tokens`, `labels`, `positions` and, where documents are masked,
    `segment_ids`, each int32, global, of `batch_shape` and sharded as `batch_spec`.
    Loss and gradients are sums over all valid tokens of all accumulation steps, in
    float32, divided once by their global number. Each device updates the part of the
    parameters whose moments it has; `state.lay` says where everything lies. What
    `memory.offload` names is taken from host memory, and left there.

    Returns:
      `step(state, batch) -> (state, metrics)`; metrics are the float32 scalars `loss`
      (the plain cross-entropy, nats a token: comparable between runs whatever they
      minimise), `objective` (what is minimised, where training.label_smoothing or
      training.z_loss make it another), `gradient_norm` (of the objective, before
      clipping) and `learning_rate`; and the int32 `counted_tokens`, over which loss and
      objective are means. Where none counts these say 0 and mean nothing: the gradient
      is 0, and the optimizer takes its step with that. With training.skipped_steps
      there is `skipped`: 1 where a number is not finite, and the state is what it was.
    """
    optimizer = optimizer_of(config, make_model)
    schedule = learning_rate_schedule(config.training)
    training, vocab_size = config.training, config.model.vocab_size
    changed = bool(training.label_smoothing or training.z_loss)
    own = own_name(config, make_model) is not None

    def laid(what: Any, tree: dict[str, Any]) -> dict[str, Any]:
        return lay(what, tree, config, make_model)

    def objective(slots: dict[str, Any], parameters: dict[str, Any], frozen, batch):
        kept = frozen_weights(config, frozen, make_model)
        weights = joined(weights_of(parameters, slots), kept)
        return training_loss(
            *_loss_arguments(config, weights, batch, make_model),
            training.label_smoothing,
            training.z_loss,
        )

    losses_and_gradients = jax.value_and_grad(objective, has_aux=True)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        parameters = state.parameters
        slots = parameters if own else laid("gradients", parameters)
        if batch["labels"].shape[0] == 1:
            sums = losses_and_gradients(
                slots, parameters, state.frozen, _part(batch, 0)
            )
        else:
            nothing = jnp.float32(0), jnp.float32(0)
            zeros = nothing, zeros_like(slots)

            def accumulate(sums, part):
                losses, gradients = losses_and_gradients(
                    slots, parameters, state.frozen, part
                )
                losses = jax.tree.map(jnp.add, sums[0], losses)
                return (losses, add(sums[1], gradients)), None

            sums, _ = jax.lax.scan(accumulate, zeros, batch)
        (minimised, loss), gradients = sums
        # A step in which no token counts has no loss; its gradients are 0.
        counted = num_valid(batch["labels"], vocab_size)
        tokens = jnp.maximum(counted, 1).astype(jnp.float32)
        gradients = laid("moments", gradients)
        parameters = laid("moments", parameters)
        skips = bool(training.skipped_steps)
        finite = jnp.isfinite(minimised) & jnp.isfinite(loss) if skips else None
        parameters, optimizer_state, norm = update(
            optimizer, gradients, tokens, parameters, state.optimizer, finite
        )
        metrics = {
            "loss": loss / tokens,
            "gradient_norm": norm,
            "learning_rate": schedule(state.step),
            "counted_tokens": counted,
        }
        if changed:
            metrics["objective"] = minimised / tokens
        number = state.step + 1
        if finite is not None:
            taken = finite & jnp.isfinite(norm)
            metrics["skipped"] = 1 - taken.astype(jnp.int32)
            number = state.step + taken.astype(state.step.dtype)
        parameters = laid("parameters", parameters)
        state = TrainState(number, parameters, optimizer_state, state.frozen)
        return state, metrics

    return step


def make_validation_step(
    config: Config, make_model: MakeModel = Transformer
) -> Callable[[dict[str, Any], Batch], tuple[Float[Array, ""], Int[Array, ""]]]:
    """Makes `step(parameters, batch) -> (sum of the loss, number of valid tokens)`.

    The loss is the plain cross-entropy in nats, whatever the run minimises. Sum both
    over batches, then divide: a mean of means would weigh tokens unequally.
    """

    def step(parameters: dict[str, Any], batch: Batch):
        part = _part(batch, 0)
        loss = cross_entropy(*_loss_arguments(config, parameters, part, make_model))
        return loss, num_valid(part["labels"], config.model.vocab_size)

    return step


def _loss_arguments(
    config: Config,
    parameters: dict[str, Any],
    batch: dict[str, Array],
    make_model: MakeModel,
) -> tuple[Array, Weight, Array, int]:
    model = model_of(config, parameters, make_model)
    x, head = features_and_head(model, batch, config.memory)
    return x, head, batch["labels"], config.memory.loss_tile_tokens


def weights_of(parameters: dict[str, Any], slots: dict[str, Any]) -> dict[str, Any]:
    """What layers use: parameters whose gradients are those of `slots`."""

    def of(parameter: Array, slot: Array) -> Weight:
        alike = jax.typeof(parameter).sharding == jax.typeof(slot).sharding
        return slot if alike else Gathered(parameter, slot)

    return jax.tree.map(of, parameters, slots)


def frozen_weights(
    config: Config, frozen: dict[str, Any], make_model: MakeModel = Transformer
) -> dict[str, Any]:
    """What layers use: matrices of which no product makes a gradient."""

    def of(parameter: Array, is_matrix: bool) -> Weight:
        return Gathered(parameter, None) if is_matrix else parameter

    multiplied = part_like(are_matrices(config, make_model), frozen)
    return jax.tree.map(of, frozen, multiplied)


def _part(batch: Batch, index: int) -> dict[str, Array]:
    return {name: values[index] for name, values in batch.items()}
