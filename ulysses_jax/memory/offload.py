"""Arrays that wait in the host's memory: moved by the layer, and checked to be there.

Where an array lies is part of its type under jit: a state that was made, or described,
in host memory makes the step move it, and the same code leaves alone what lies on the
device.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

HOST = "pinned_host"
_SPACE = jax.memory.Space


def in_host(tree: Any) -> bool:
    """Under jit: whether an array of the tree lies in host memory."""
    return any(jax.typeof(x).memory_space == _SPACE.Host for x in jax.tree.leaves(tree))


def to_device(tree: Any) -> Any:
    """The same values on the device; their cotangents go back where they came from."""
    return jax.tree.map(
        lambda x: jax.device_put(x, _SPACE.Device) if in_host(x) else x, tree
    )


def refetch(tree: Any) -> Any:
    """`to_device`, at this point of the program and not before.

    XLA would hold on the device, until here, what was fetched or sent away earlier.
    """
    return jax.tree.map(
        lambda x: to_device(lax.optimization_barrier(x)) if in_host(x) else x, tree
    )


def to_host(tree: Any) -> Any:
    """The same values in host memory, but for numbers."""
    return jax.tree.map(lambda x: jax.device_put(x, _SPACE.Host) if x.ndim else x, tree)


def to_memory_of(likes: Any, tree: Any) -> Any:
    """The values of a tree where those of `likes` lie."""
    return jax.tree.map(lambda like, x: to_host(x) if in_host(like) else x, likes, tree)


def zeros_like_layers(stacked: Any) -> Any:
    """Zeros for a pytree of arrays with a leading dim L, each in the memory of its own.

    They are written one layer after another: XLA takes a whole array of zeros in host
    memory that is updated in place for one that need not be filled. A barrier keeps
    them apart: of equal ones XLA would write one, and copy it within host memory.
    """

    def zeros(_: None, i: Array) -> tuple[None, Any]:
        layer = jax.tree.map(jnp.zeros_like, _layer(stacked, i))
        return None, to_memory_of(stacked, lax.optimization_barrier(layer))

    return lax.scan(zeros, None, jnp.arange(_num_layers(stacked)))[1]


def update_layers(body: Callable[[Any, Any], Any], written: Any, read: Any) -> Any:
    """`written[l] = body(written[l], read[l])`, one layer after another, in place.

    Args:
      body: from and to the values of one layer, on the device.
      written: a pytree of arrays with a leading dim L, in either memory. Those without
        dims, such as counts, are given to every layer and stay as they are.
      read: alike.

    Returns:
      `written`, each array in the memory where it was.

    Cost: one layer's arrays on the device; each array in host memory crosses PCIe once,
    and those of `written` once more, back.
    """

    def write(whole: Array, layer: Array, i: Array) -> Array:
        if whole.ndim == 0:
            return whole
        layer = to_memory_of(whole, layer)
        return lax.dynamic_update_index_in_dim(whole, layer, i, 0)

    def one_layer(written: Any, i: Array) -> tuple[Any, None]:
        layers = body(_layer(written, i), _layer(read, i))
        return jax.tree.map(lambda w, x: write(w, x, i), written, layers), None

    return lax.scan(one_layer, written, jnp.arange(_num_layers(written)))[0]


def sum_layers(
    body: Callable[[Any], Float[Array, ""]], read: Any, start: Float[Array, ""]
) -> Float[Array, ""]:
    """`start` plus `body(read[l])` for each layer, of which one is on the device."""

    def one_layer(total: Array, i: Array) -> tuple[Array, None]:
        return total + body(_layer(read, i)), None

    return lax.scan(one_layer, start, jnp.arange(_num_layers(read)))[0]


def _layer(stacked: Any, i: Array) -> Any:
    def cut(x: Array) -> Array:
        return lax.dynamic_index_in_dim(x, i, keepdims=False) if x.ndim else x

    return to_device(jax.tree.map(cut, stacked))


def _num_layers(stacked: Any) -> int:
    return next(x.shape[0] for x in jax.tree.leaves(stacked) if x.ndim)


def memory_stats(compiled: jax.stages.Compiled) -> dict[str, int]:
    """The fields of a program's `memory_analysis()`, bytes, without "_in_bytes".

    Raises:
      ValueError: the platform gives none.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise ValueError("XLA gives no analysis of the program's memory")
    suffix = "_in_bytes"
    return {
        name.removesuffix(suffix): int(getattr(analysis, name))
        for name in dir(analysis)
        if name.endswith(suffix)
    }


def check_host_memory(offload: tuple[str, ...], device: Any) -> None:
    """Refuses to offload where JAX has no host memory to move to, before compiling.

    Raises:
      ValueError: names the memories that the device has.
    """
    kinds = [memory.kind for memory in device.addressable_memories()]
    if offload and HOST not in kinds:
        raise ValueError(
            f"memory.offload {' '.join(offload)} moves to {HOST}, but a device of "
            f"{device.platform} has {', '.join(kinds) or 'no memories'}: use an empty "
            "memory.offload, or another version of jax"
        )


def check_offload(
    expected: Mapping[str, int], stats: Mapping[str, int], platform: str
) -> None:
    """Refuses a compiled step that keeps on the device what it should offload.

    Args:
      expected: bytes a device that should be in host memory, by the word of
        `memory.offload`; see `training.state.host_bytes`.
      stats: the compiled program's `memory_stats`.
      platform: of its devices. On "cpu" the two memories are one, so XLA drops the
        moves and nothing can be checked.

    Raises:
      ValueError: the program has less in host memory. A program that has all of it
        there, and besides a copy on the device, is not seen: read its device bytes.
    """
    if platform == "cpu":
        return
    found = stats["host_argument_size"] + stats["host_temp_size"]
    if found < sum(expected.values()):
        wanted = ", ".join(f"{word} {size:,}" for word, size in expected.items())
        raise ValueError(
            f"memory.offload {' '.join(expected)} should put {wanted} bytes in host "
            f"memory, but the compiled step has {found:,} bytes there: XLA left the "
            f"rest on the {platform} device; use a smaller memory.offload, or another "
            "version of jax"
        )
