"""Rotary positions as a config has them: which fields belong together."""

from ulysses_jax.config import Rope


def check_rope(rope: Rope, head_size: int) -> None:
    """Refuses what no frequencies can be made of.

    Raises:
      ValueError: an odd number of features to turn; fields that are missing, or that
        the scaling does not read.
    """
    size = turned_features(rope, head_size)
    if rope.fraction == 1 and size % 2:
        raise ValueError(
            f"model.head_size {size} is odd: RoPE turns pairs; use {size + 1}"
        )
    if size % 2 or not size:
        even = max(size // 2 * 2, 2)
        raise ValueError(
            f"model.rope.fraction {rope.fraction} of a model.head_size of {head_size} "
            f"are {size} features, and RoPE turns pairs: use {even / head_size} for "
            f"{even}"
        )
    scaling, factor = rope.scaling, rope.factor
    if scaling == "none":
        if factor != 1:
            raise ValueError(
                f"model.rope.factor {factor} stretches nothing while model.rope.scaling"
                " is none: name one, such as yarn, or leave the factor at 1"
            )
        return
    if factor < 1:
        raise ValueError(
            f"model.rope.factor {factor} would shrink a model: use 1 or more"
        )
    if scaling != "linear" and rope.original_tokens is None:
        raise ValueError(
            f"model.rope.scaling {scaling} needs model.rope.original_tokens, the "
            "longest sequence that the model was trained for before: set it"
        )
    if scaling == "dynamic" and size == 2:
        raise ValueError(
            "model.rope.scaling dynamic has no base for heads that turn 2 features: "
            "use linear"
        )
    for low, high in (
        ("low_frequency_factor", "high_frequency_factor"),
        ("beta_slow", "beta_fast"),
    ):
        if getattr(rope, low) >= getattr(rope, high):
            raise ValueError(
                f"model.rope.{low} {getattr(rope, low)} is not below model.rope.{high} "
                f"{getattr(rope, high)}: swap them, or leave both out"
            )
    if scaling != "longrope":
        return
    for name in ("short_factors", "long_factors"):
        given = getattr(rope, name)
        if len(given) != size // 2 or min(given) <= 0:
            raise ValueError(
                f"model.rope.{name} are {len(given)} numbers, and longrope slows each "
                f"of {size // 2} pairs by a positive one: give {size // 2}"
            )


def turned_features(rope: Rope, head_size: int) -> int:
    """How many of a head's features are turned, the first ones."""
    return int(head_size * rope.fraction)
