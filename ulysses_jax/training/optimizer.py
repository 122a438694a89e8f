"""AdamW with decoupled weight decay, warmup and cosine, global-norm clipping."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from ulysses_jax.config import Training


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


def rate_change(before: dict[str, Any], training: Training, step: int) -> list[str]:
    """A line, where a run that goes on after `step` does so at another learning rate.

    Args:
      before: `schedule_fields` of the run that saved the step.
    """
    was: Any = learning_rate_schedule(dataclasses.replace(training, **before))
    new: Any = learning_rate_schedule(training)
    last, planned, rate = float(was(step - 1)), float(was(step)), float(new(step))
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
    training: Training, decayed: dict[str, Any]
) -> optax.GradientTransformationExtraArgs:
    """Clips by the global norm, then AdamW; only matrices decay (arXiv 1711.05101).

    Args:
      decayed: a tree like the parameters: whether weight decay is of each.

    `update(gradients, state, parameters, norm=...)` takes the norm of all gradients, so
    that it may be given a part of them; without one they are all there are.
    """

    def of(parameters: Any) -> dict[str, Any]:
        return {name: decayed[name] for name in parameters}

    return optax.chain(
        _clip(training.clip_norm),
        optax.adamw(
            learning_rate_schedule(training),
            b1=training.beta1,
            b2=training.beta2,
            weight_decay=training.weight_decay,
            mask=of,
        ),
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
