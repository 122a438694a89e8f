"""AdamW with decoupled weight decay, warmup and cosine, global-norm clipping."""

from functools import partial

import jax
import optax

from ulysses_jax.config import Training
from ulysses_jax.models.linear import is_matrix


def learning_rate_schedule(training: Training) -> optax.Schedule:
    """Linear warmup from 0 to the peak, then a cosine to the final rate."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=training.learning_rate,
        warmup_steps=training.warmup_steps,
        decay_steps=max(training.num_steps, training.warmup_steps + 1),
        end_value=training.final_learning_rate,
    )


def make_optimizer(training: Training) -> optax.GradientTransformation:
    """Clips by the global norm, then AdamW; only matrices decay (arXiv 1711.05101)."""
    return optax.chain(
        optax.clip_by_global_norm(training.clip_norm),
        optax.adamw(
            learning_rate_schedule(training),
            b1=training.beta1,
            b2=training.beta2,
            weight_decay=training.weight_decay,
            mask=partial(
                jax.tree_util.tree_map_with_path, lambda path, _: is_matrix(path)
            ),
        ),
    )
