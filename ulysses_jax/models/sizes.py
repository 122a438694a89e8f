"""The sizes of a model's letters, and how large its weights start."""

import math

from ulysses_jax.config import Model


def letter_sizes(model: Model, kind: str | None = None) -> dict[str, int]:
    """The size of every letter that a parameter has, in a layer of this kind.

    Of kind delta N and K are the heads of values and of keys, H is a key's size and U a
    value's; W are the tokens of a convolution.
    """
    assert model.num_kv_heads and model.head_size and model.feed_forward_width
    sizes = {
        "D": model.width,
        "N": model.num_heads,
        "K": model.num_kv_heads,
        "H": model.head_size,
        "F": model.feed_forward_width,
        "V": model.vocab_size,
        "R": model.lora.rank if model.lora else 0,
    }
    if kind == "delta":
        own = dict(zip("NKHU", model.state_sizes(kind), strict=True))
        sizes |= own | {"W": model.convolution_tokens}
    return sizes


# Standard deviations as in GPT-2 and Megatron: projections back into the residual
# stream are smaller, so that its variance does not grow with the number of layers.
STD = 0.02


def output_std(model: Model) -> float:
    return STD / math.sqrt(2 * model.num_layers)
