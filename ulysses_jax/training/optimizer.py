"""The optimizer by its name: decoupled weight decay, warmup, cosine, clipping."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from ulysses_jax.config import Training
from ulysses_jax.models.adapter import part_like
from ulysses_jax.training.adafactor import scale_by_adafactor
from ulysses_jax.training.muon import scale_by_muon
from ulysses_jax.training.update import LAYERS

REST = "rest"
"""The parameters under this name are of layers that lie in no stack."""


def learning_rate_schedule(training: Training) -> optax.Schedule:
    """Linear warmup from 0 to the peak, then a cosine to the final rate."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=training.learning_rate,
        warmup_steps=training.warmup_steps,
        decay_steps=max(training.num_steps, training.warmup_steps + 1),
        end_value=training.final_learning_rate,
    )


def schedule_fields(training: Training) -> dict[str, Any]:
    """What the learning rate of a step depends on, for a checkpoint's meta."""
    names = ("num_steps", "warmup_steps", "learning_rate", "final_learning_rate")
    return {name: getattr(training, name) for name in names}


def rate_change(
    before: dict[str, Any], training: Training, step: int, taken: int
) -> list[str]:
    """A line, where a run that goes on after `step` does so at another learning rate.

    Args:
      before: `schedule_fields` of the run that saved the step.
      taken: of the steps so far, those that the schedule counts: fewer, where some
        were skipped or gone back from.
    """
    was: Any = learning_rate_schedule(dataclasses.replace(training, **before))
    new: Any = learning_rate_schedule(training)
    last, planned, rate = float(was(taken - 1)), float(was(taken)), float(new(taken))
    if abs(rate - planned) <= 0.01 * planned:
        return []
    now = schedule_fields(training)
    changes = [
        f"training.{name} was {before[name]}, is {now[name]}"
        for name in now
        if before.get(name, now[name]) != now[name]
    ]
    return [
        f"the learning rate goes from {last:.3g} at step {step} to {rate:.3g} at step "
        f"{step + 1}: {', '.join(changes)}, and the schedule is drawn anew over all "
        f"steps; to go on at {last:.3g}, set training.learning_rate and "
        "training.final_learning_rate to it"
    ]


def make_optimizer(
    training: Training, decayed: dict[str, Any], matrices: dict[str, Any]
) -> optax.GradientTransformationExtraArgs:
    """Clips by the global norm, then steps; only matrices decay (arXiv 1711.05101).

    Args:
      decayed: a tree like the parameters: whether weight decay is of each.
      matrices: likewise, how its dims make a `Matrix`.

    The parameters may be a part of these trees. `update(gradients, state, parameters,
    norm=...)` takes the norm of all gradients, so that it may be given a part of them;
    without one they are all there are. What lies in `layers` may be one layer of each
    stack there.
    """

    def of(parameters: Any) -> dict[str, Any]:
        return part_like(decayed, parameters)

    return optax.chain(
        _clip(training.clip_norm),
        optax.chain(
            _rescaled(training, decayed, matrices),
            optax.add_decayed_weights(training.weight_decay, of),
            optax.scale_by_learning_rate(learning_rate_schedule(training)),
        ),
    )


def _rescaled(
    training: Training, decayed: dict[str, Any], matrices: dict[str, Any]
) -> optax.GradientTransformation:
    """What makes an update of gradients, before decay and the learning rate."""
    beta1, beta2 = training.beta1, training.beta2
    match training.optimizer:
        case "adamw":
            return optax.scale_by_adam(beta1, beta2)
        case "lion":
            return optax.scale_by_lion(beta1, beta2)
        case "sgd":
            return optax.trace(beta1)
        case "adafactor":
            return scale_by_adafactor(matrices)
        case "muon":
            return _muon_and_adam(beta1, beta2, decayed, matrices)


def _muon_and_adam(
    beta1: float, beta2: float, decayed: dict[str, Any], matrices: dict[str, Any]
) -> optax.GradientTransformation:
    """Muon of the matrices inside layers, Adam of all others."""
    in_layers = {
        name: jax.tree.map(
            lambda decays, matrix, name=name: (
                name in (LAYERS, REST) and decays and matrix.num_row_dims is not None
            ),
            decayed[name],
            matrices[name],
        )
        for name in decayed
    }

    def others(parameters: Any) -> Any:
        return jax.tree.map(lambda each: not each, part_like(in_layers, parameters))

    return optax.chain(
        optax.masked(scale_by_muon(beta1, matrices), lambda p: part_like(in_layers, p)),
        optax.masked(optax.scale_by_adam(beta1, beta2), others),
    )


def _clip(clip_norm: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm`, with a norm from outside."""

    def init(params: Any) -> optax.EmptyState:
        return optax.EmptyState()

    def update(
        updates: Any, state: Any, params: Any = None, *, norm: Any = None
    ) -> tuple[Any, Any]:
        length: Float[Array, ""] = optax.tree.norm(updates) if norm is None else norm
        clipped = jax.tree.map(
            lambda x: jnp.where(length < clip_norm, x, x / length * clip_norm), updates
        )
        return clipped, state

    return optax.GradientTransformationExtraArgs(init, update)
