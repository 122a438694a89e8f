"""Which attention a device runs: the one that a name means, or the fastest there is."""

import warnings
from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array

from ulysses_jax.attention.blockwise import (
    blockwise_attention,
    blockwise_gradients,
    blockwise_statistics,
)
from ulysses_jax.attention.cudnn import (
    check_cudnn,
    cudnn_attention,
    cudnn_attention_with_logsumexp,
    cudnn_gradients,
    cudnn_lacks,
)
from ulysses_jax.attention.mask import Mask
from ulysses_jax.attention.mosaic import (
    TOKAMAX,
    mosaic_gradients,
    mosaic_lacks,
    mosaic_statistics,
    tokamax_lacks,
)
from ulysses_jax.attention.parts import Parts, attention_of
from ulysses_jax.attention.reference import reference_attention
from ulysses_jax.mesh import Device

PARTS = {
    "cudnn": Parts(cudnn_attention_with_logsumexp, cudnn_gradients),
    "mosaic": Parts(mosaic_statistics, mosaic_gradients),
    "blockwise": Parts(blockwise_statistics, blockwise_gradients),
}
# The names that a config may choose; "auto" is the fastest of these.
ATTENTIONS: dict[str, Callable[..., Array]] = {
    "cudnn": cudnn_attention,
    "mosaic": attention_of(PARTS["mosaic"]),
    "blockwise": blockwise_attention,
    "reference": reference_attention,
}
_REMEDY = (
    f"use Python 3.12 or newer and pip install tokamax=={TOKAMAX} "
    "'jax[cuda13]>=0.11,<0.13'"
)


class Choice(NamedTuple):
    """An attention's name, and why no faster one: "" where there is none."""

    name: str
    why: str = ""


def check_attention(name: str) -> None:
    """Raises ValueError for what is no name of an attention."""
    if name != "auto" and name not in ATTENTIONS:
        names = ", ".join(map(repr, ATTENTIONS))
        raise ValueError(f"there is no attention {name!r}: use 'auto', {names}")


def choose(name: str, device: Device, q: Array, k: Array, mask: Mask) -> Choice:
    """The attention that a name means for these shapes, this mask and device.

    On GPUs "auto" is cuDNN where it has the mask: by index alone (no segments, no
    positions; a window only with causal and no more queries than keys), in bfloat16 or
    float16, for head sizes up to 128 in steps of 8. Else, on Hopper, tokamax's Mosaic
    kernel: any mask whose keys lie in order, head sizes up to 256. Everything else, and
    every other device, is blockwise, which has no limits and is slow on GPUs.

    Args:
      q, k: of which only shape and dtype are read, as the device has them.

    Raises:
      ValueError: a name that there is not; a kernel that this device, dtype or head
        size does not have, or that the packages here do not (`tokamax_lacks`).
    """
    check_attention(name)
    if name in ("cudnn", "mosaic") and not device.is_gpu:
        raise ValueError(
            f"attention {name} needs GPUs, and these are {device.platform} devices: "
            "use attention auto (of the function: None), or blockwise"
        )
    if name == "mosaic":
        if lacks := mosaic_lacks(device, q, mask):
            raise ValueError(
                f"attention mosaic has no kernel for {lacks}: use attention auto (of "
                "the function: None), or blockwise"
            )
        if lacks := tokamax_lacks():
            raise ValueError(f"attention mosaic {lacks}: {_REMEDY}")
    if name == "cudnn":
        check_cudnn(q, k, mask)
    if name != "auto":
        return Choice(name)
    if not device.is_gpu:
        return Choice("blockwise")
    cudnn = cudnn_lacks(q, k, mask)
    if cudnn is None:
        return Choice("cudnn")
    mosaic = mosaic_lacks(device, q, mask)
    if mosaic is not None:
        return Choice("blockwise", f"cuDNN has not {cudnn}, Mosaic not {mosaic}")
    if lacks := tokamax_lacks():
        raise ValueError(
            f"cuDNN has no attention for {cudnn}, and the kernel that has it {lacks}: "
            f"{_REMEDY}; or ask for attention blockwise, which is tens of times slower "
            "on a GPU"
        )
    return Choice("mosaic")


def local_attention(
    name: str, device: Device, q: Array, k: Array, mask: Mask
) -> Callable[..., Array]:
    """The attention to whole rows that `choose` names; warns where it will be slow."""
    return ATTENTIONS[_told(choose(name, device, q, k, mask))]


def attention_parts(name: str, device: Device, q: Array, k: Array, mask: Mask) -> Parts:
    """The same, taken apart.

    Raises:
      ValueError: also for the dense reference, which has no parts.
    """
    choice = choose(name, device, q, k, mask)
    if choice.name not in PARTS:
        raise ValueError(
            f"model.attention {name} cannot attend to some keys at a time: use auto, "
            + " or ".join(PARTS)
        )
    return PARTS[_told(choice)]


def _told(choice: Choice) -> str:
    if choice.why:
        warnings.warn(
            "attention runs tile by tile in plain JAX, tens of times slower than a "
            f"kernel of this GPU: {choice.why}",
            stacklevel=2,
        )
    return choice.name
