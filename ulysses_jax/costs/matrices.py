"""The matrices of a model, by their sizes."""

from ulysses_jax.config import Model


def layer_matrices(model: Model) -> list[tuple[int, int]]:
    """Of one layer of a completed model, both sides of each: D, and heads or F."""
    assert model.num_kv_heads and model.head_size and model.feed_forward_width
    heads = [model.num_heads] * 2 + [model.num_kv_heads] * 2
    others = [each * model.head_size for each in heads]
    others += [model.feed_forward_width] * (3 if model.is_gated else 2)
    return [(model.width, other) for other in others]


def matrix_elements(model: Model) -> tuple[int, int]:
    """Elements of the layers' matrices; of the embedding, positions and head."""
    layer = sum(width * other for width, other in layer_matrices(model))
    positions = (model.max_positions or 0) if model.positions == "learned" else 0
    # XLA gathers a tied table once, and adds its two gradients before it scatters them.
    tables = 1 if model.tied_embeddings else 2
    rest = model.width * (tables * model.vocab_size + positions)
    return model.num_layers * layer, rest
