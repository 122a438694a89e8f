"""What is asked of kernels: masks as data, the kernels, arrays to attend to."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ulysses_jax.attention.cudnn import cudnn_lacks, through_jax_nn
from ulysses_jax.attention.layouts import random
from ulysses_jax.attention.mask import Mask
from ulysses_jax.attention.mosaic import BLOCK_STEP
from ulysses_jax.attention.parts import attention_of
from ulysses_jax.attention.select import ATTENTIONS, PARTS, choose
from ulysses_jax.mesh import Device
from ulysses_jax.training.model import padding_apart


class Problem(NamedTuple):
    """A mask, how many pairs of a query and a key it shows, over the batch, and whether
    each head has a sink."""

    mask: Mask
    pairs: int
    has_sinks: bool = False


class Heads(NamedTuple):
    """Query heads, key/value heads, and their size."""

    N: int
    K: int
    H: int


def _near(tokens: int, window: int | None = None) -> int:
    """Pairs of one document under a causal mask, as far as a window reaches."""
    window = min(window or tokens, tokens)
    return window * (window + 1) // 2 + (tokens - window) * window


def _packed(batch: int, tokens: int, span: int, window: int | None = None) -> Problem:
    """Documents as the trainer packs them, in each row shorter than in the one before;
    what is left at a row's end is padding, each token of which sees itself."""
    segments = np.zeros((batch, tokens), np.int32)
    positions = np.zeros((batch, tokens), np.int32)
    pairs = 0
    for row in range(batch):
        size = span * 2 // (2 + row)
        whole = tokens // size
        places = np.arange(tokens, dtype=np.int32)
        segments[row] = np.where(places < whole * size, places // size + 1, 0)
        positions[row] = places % size
        pairs += whole * _near(size, window) + tokens % size
    ids, at = padding_apart(jnp.asarray(segments)), jnp.asarray(positions)
    mask = Mask(
        causal=True,
        window=window,
        q_segment_ids=ids,
        kv_segment_ids=ids,
        q_positions=at,
        kv_positions=at,
    )
    return Problem(mask, pairs)


DENSITY = 1 / 8  # of a block-sparse mask, for a multiple of BLOCK_STEP tokens


def _sparse(batch: int, tokens: int, span: int) -> Problem:
    """An eighth of the pairs; blocks of 512 tokens, or where there are few of 64."""
    size = 512 if tokens >= 8192 else BLOCK_STEP
    layout = random(tokens // size, block_tokens=size, density=DENSITY)
    tiles = int(layout.blocks.sum())
    pairs = (tiles - tokens // size) * size**2 + tokens // size * _near(size)
    return Problem(Mask(causal=True, layout=layout), batch * pairs)


# A mask by its name: f(batch, tokens, span), where span is a document's tokens, or a
# window's.
MASKS: dict[str, Callable[[int, int, int], Problem]] = {
    "causal": lambda B, T, span: Problem(Mask(causal=True), B * _near(T)),
    "packed": _packed,
    "window": lambda B, T, span: Problem(
        Mask(causal=True, window=span), B * _near(T, span)
    ),
    "packed window": lambda B, T, span: _packed(B, T, span, span // 2),
    "sinks": lambda B, T, span: Problem(Mask(causal=True), B * _near(T), True),
    "block-sparse": _sparse,
    "full": lambda B, T, span: Problem(Mask(), B * T * T),
}


class Kernel(NamedTuple):
    """What attends.

    Attributes:
      attend: f(q, k, v, mask=).
      attend_with_sinks: f(q, k, v, mask=, sinks=); None: there is none.
      mask_lacks: f(device, q, k, mask), why not, or None.
    """

    attend: Callable[..., Array]
    attend_with_sinks: Callable[..., Array] | None
    mask_lacks: Callable[[Device, Any, Any, Mask], str | None]

    def lacks(self, device: Device, q: Any, k: Any, problem: Problem) -> str | None:
        if problem.has_sinks and self.attend_with_sinks is None:
            return "it has no sinks"
        return self.mask_lacks(device, q, k, problem.mask)


def _chosen(name: str, device: Device, q: Any, k: Any, mask: Mask) -> str | None:
    try:
        choose(name, device, q, k, mask)
    except ValueError as error:
        return str(error)
    return None


def _cudnn_lacks(device: Device, q: Any, k: Any, mask: Mask) -> str | None:
    if why := _chosen("cudnn", device, q, k, mask):
        return why
    lacks = cudnn_lacks(q, k, mask)
    return lacks and f"cuDNN through jax.nn has none for {lacks}"


def _mosaic_lacks(device: Device, q: Any, k: Any, mask: Mask) -> str | None:
    if not device.is_gpu:
        return (
            "it needs a GPU: JAX's interpreter of Mosaic's GPU kernels knows neither "
            "inline_mgpu nor operands of wgmma that lie in registers"
        )
    why = _chosen("mosaic", device, q, k, mask)
    return why and why.removeprefix("attention mosaic is ")


def _jax_nn_lacks(device: Device, q: Any, k: Any, mask: Mask) -> str | None:
    if why := _cudnn_lacks(Device("gpu", device.kind), q, k, mask):
        return why
    if not device.is_gpu and q.dtype == jnp.float16:
        return "jax.nn has no attention in float16 on CPUs"
    return None


def kernels(device: Device) -> dict[str, Kernel]:
    """What there is to attend with, by name; jax.nn's own stands beside them.

    Where there is no GPU jax.nn runs XLA's attention, so that the check can be tried.
    """
    implementation = "cudnn" if device.is_gpu else "xla"
    beside = partial(through_jax_nn, scale=None, implementation=implementation)
    parts = {name: attention_of(each) for name, each in PARTS.items()}
    cudnn, mosaic, blockwise = (
        parts[name] for name in ("cudnn", "mosaic", "blockwise")
    )
    return {
        "cudnn": Kernel(ATTENTIONS["cudnn"], cudnn, _cudnn_lacks),
        "cudnn in parts": Kernel(cudnn, cudnn, _cudnn_lacks),
        "mosaic": Kernel(mosaic, mosaic, _mosaic_lacks),
        "blockwise": Kernel(ATTENTIONS["blockwise"], blockwise, lambda *_: None),
        f"jax.nn {implementation}": Kernel(beside, None, _jax_nn_lacks),
    }


def shapes(
    batch: int, tokens: int, heads: Heads, dtype: str = "bfloat16"
) -> tuple[Any, Any, Any, Any]:
    """q, k, v and the upstream gradient, as shapes."""

    def shape(num_heads):
        dims = batch, tokens, num_heads, heads.H
        return jax.ShapeDtypeStruct(dims, jnp.dtype(dtype))

    return shape(heads.N), shape(heads.K), shape(heads.K), shape(heads.N)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def arrays(
    batch: int, tokens: int, heads: Heads, dtype: str = "bfloat16"
) -> tuple[Array, ...]:
    """Standard normal q, k, v and upstream gradient: always the same ones."""
    like = shapes(batch, tokens, heads, dtype)
    keys = jax.random.split(jax.random.key(0), len(like))
    return tuple(
        jax.random.normal(key, x.shape, x.dtype)
        for key, x in zip(keys, like, strict=True)
    )


def sinks(num_heads: int) -> Array:
    """None outweighs all keys, and none is outweighed by them."""
    return jnp.linspace(-1, 3, num_heads)


def forward(kernel: Kernel, problem: Problem) -> Callable[..., Any]:
    """f(mask, q, k, v, upstream) -> out: the same arguments as `both_ways`."""

    def run(mask, *arrays):
        attend, inputs = _call(kernel, problem, mask, *arrays[:3])
        return attend(*inputs)

    return run


def both_ways(kernel: Kernel, problem: Problem) -> Callable[..., tuple[Array, ...]]:
    """f(mask, q, k, v, upstream) -> (out, dq, dk, dv), and dsinks where there are."""

    def run(mask, *arrays):
        attend, inputs = _call(kernel, problem, mask, *arrays[:3])
        out, pull = jax.vjp(attend, *inputs)
        return out, *pull(arrays[3])

    return run


def _call(kernel: Kernel, problem: Problem, mask: Mask, q, k, v):
    """A function, and what it is called with."""
    if not problem.has_sinks:
        return partial(kernel.attend, mask=mask), (q, k, v)
    attend = kernel.attend_with_sinks
    assert attend

    def with_sinks(q, k, v, sinks):
        return attend(q, k, v, mask=mask, sinks=sinks)

    return with_sinks, (q, k, v, sinks(q.shape[2]))


def compiled(function: Callable[..., Any], mask: Mask, like: tuple[Any, ...]) -> Any:
    """The program; on the CPU, where its speed says nothing, a quick compilation."""
    quick = {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    }
    options = quick if jax.default_backend() == "cpu" else None
    return jax.jit(function).lower(mask, *like).compile(options)
