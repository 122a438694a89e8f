"""The attention that a name means; the best for a backend, a mask and a dtype."""

from collections.abc import Callable

from jaxtyping import Array

from ulysses_jax.attention.blockwise import blockwise_attention
from ulysses_jax.attention.cudnn import cudnn_attention, cudnn_can
from ulysses_jax.attention.mask import Mask
from ulysses_jax.attention.reference import reference_attention

# The names that a config may choose; "auto" is `local_attention`.
ATTENTIONS: dict[str, Callable[..., Array]] = {
    "blockwise": blockwise_attention,
    "cudnn": cudnn_attention,
    "reference": reference_attention,
}


def check_attention(name: str) -> None:
    """Raises ValueError for what is no name of an attention."""
    if name != "auto" and name not in ATTENTIONS:
        names = ", ".join(map(repr, ATTENTIONS))
        raise ValueError(f"there is no attention {name!r}: use 'auto', {names}")


def local_attention(
    platform: str, q: Array, k: Array, mask: Mask
) -> Callable[..., Array]:
    """The fastest attention that honours the mask.

    On GPUs: cuDNN, for bfloat16 and float16, head sizes up to 128 in steps of 8, and
    masks by index alone (no segments, no positions of the caller's, a window only with
    causal and no more queries than keys). Everything else: `blockwise_attention`, which
    has no limits.
    """
    if platform in ("gpu", "cuda") and cudnn_can(q, k, mask):
        return cudnn_attention
    return blockwise_attention
