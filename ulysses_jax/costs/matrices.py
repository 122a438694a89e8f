"""The matrices of a model, by their sizes."""

from collections import Counter

from ulysses_jax.config import Model
from ulysses_jax.config.model import RECURRENT


def layer_matrices(model: Model, kind: str) -> list[tuple[int, int]]:
    """Of one layer of a completed model, both sides of each: D, and heads or F."""
    assert model.feed_forward_width
    others = [*_heads(model, kind)]
    others += [model.feed_forward_width] * (3 if model.is_gated else 2)
    return [(model.width, other) for other in others]


def layer_elements(model: Model, kind: str) -> int:
    """Elements of one layer's matrices."""
    return sum(width * other for width, other in layer_matrices(model, kind))


def matrix_elements(model: Model) -> tuple[int, int]:
    """Elements of the layers' matrices; of the embedding, positions and head."""
    layers = sum(
        count * layer_elements(model, kind)
        for kind, count in Counter(model.kinds()).items()
    )
    positions = (model.max_positions or 0) if model.positions == "learned" else 0
    # XLA gathers a tied table once, and adds its two gradients before it scatters them.
    tables = 1 if model.tied_embeddings else 2
    rest = model.width * (tables * model.vocab_size + positions)
    return layers, rest


def _heads(model: Model, kind: str) -> list[int]:
    """Of the part that reaches other tokens, by kind as `models.kinds` makes it."""
    assert model.num_kv_heads and model.head_size
    wide = model.attended_features(kind)
    if kind in RECURRENT:
        sizes = model.state_sizes(kind)
        found = [wide] * 3  # v, gate and out
        found += [sizes.num_key_heads * sizes.key_size] * 2  # q and k
        return found + [sizes.num_heads] * 2 * (kind == "delta")  # beta and decay
    shared = [model.num_kv_heads * model.head_size] * 2
    return [wide] * (2 + model.attention_gate) + shared  # q, gate, out; k and v
