"""Megatron's sequence parallelism: heads lie over `seq` before attention is called."""

from collections.abc import Callable
from typing import Any

from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float

from ulysses_jax.parallel.spread import check_arrays, own_heads, spread
from ulysses_jax.sharding import MEGATRON
from ulysses_jax.strategies import check_split


def megatron(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mesh: Mesh | AbstractMesh,
    attention: Callable[..., Array],
    mask: Any,
    scale: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    by_head: bool = False,
) -> Float[Array, "B T N H"]:
    """Attention of every device's own heads over all tokens; nothing is sent.

    Args:
      q, k, v: global arrays; the batch over (data, fsdp), heads over (tensor, seq),
        tokens whole, as `weights.gathered_tokens.project_gathered` makes them.
      mesh, attention, mask, scale, sinks, by_head: as `parallel.ulysses.ulysses`.

    Returns:
      The attended values, global, sharded as q.

    Raises:
      ValueError: heads that do not divide over tensor x seq; shapes that do not fit
        each other or the mesh.
    """
    axes = check_arrays(q, k, v, mesh)
    degrees = {axis: axes.get(axis, 1) for axis in ("fsdp", "seq", "tensor")}
    check_split({"num_heads": q.shape[2], "num_kv_heads": k.shape[2]}, degrees)

    def local(q, k, v, sinks, mask):
        options = {} if sinks is None else {"sinks": sinks}
        q, k, v = (checkpoint_name(x, "attention_inputs") for x in (q, k, v))
        if by_head:
            mask = mask.of_heads(own_heads(q, mesh, MEGATRON))
        return attention(q, k, v, mask=mask, scale=scale, **options)

    return spread(local, q, k, v, mask, mesh, MEGATRON, sinks=sinks)
