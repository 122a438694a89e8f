"""All-gather attention: every device has all keys and values, queries stay."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float

from ulysses_jax.parallel.blocks import Blocks, KeysAndValues
from ulysses_jax.parallel.spread import check_arrays, own_heads, spread


def all_gather(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mesh: Mesh | AbstractMesh,
    mask: Any,
    scale: float | None = None,
    parts: Any,
    zigzag: bool = False,
    sinks: Float[Array, "N"] | None = None,
    by_head: bool = False,
) -> Float[Array, "B T N H"]:
    """Attention over a sequence that is sharded over `seq`, whose keys are gathered.

    Args: global arrays; as `parallel.ring.ring_attention`'s otherwise; by_head as
      `parallel.ulysses.ulysses`'s.

    Raises:
      ValueError: shapes that do not fit each other or the mesh.
    """
    check_arrays(q, k, v, mesh)

    def local(q, k, v, sinks, mask):
        if by_head:
            mask = mask.of_heads(own_heads(q, mesh))
        return all_gather_attention(
            q, k, v, mask=mask, scale=scale, parts=parts, zigzag=zigzag, sinks=sinks
        )

    return spread(local, q, k, v, mask, mesh, sinks=sinks)


def all_gather_attention(
    q: Float[Array, "B t N H"],
    k: Float[Array, "B s K H"],
    v: Float[Array, "B s K H"],
    *,
    mask: Any,
    scale: float | None = None,
    parts: Any,
    zigzag: bool = False,
    sinks: Float[Array, "N"] | None = None,
    axis_name: str = "seq",
) -> Float[Array, "B t N H"]:
    """Attention over tokens that lie over a mesh axis; call it inside `jax.shard_map`.

    Args, returns: as `parallel.ring.ring_attention`.

    Cost: one all-gather of k and v together forward; one reduce-scatter of their
    float32 gradients backward. All keys and values of a row, and in the backward pass
    their float32 gradients, lie on every device. What a causal mask hides of another's
    block is not computed: half of all, in zigzag order by every member alike.

    Source: context parallelism of Llama 3, arXiv 2407.21783, section 3.3.2.
    """
    blocks = Blocks(parts, scale, axis_name, zigzag)
    return _attend(blocks, q, k, v, sinks, jax.tree.map(jnp.asarray, mask))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(blocks: Blocks, q, k, v, sinks, mask):
    return _forward(blocks, q, k, v, sinks, mask)[0]


def _forward(blocks: Blocks, q, k, v, sinks, mask):
    kv = jnp.stack((k, v))  # one gather of both: [member, 2, B, s, K, H]
    gathered = lax.all_gather(kv, blocks.axis_name)
    q, gathered = (checkpoint_name(x, "attention_inputs") for x in (q, gathered))

    def one_block(so_far, step):
        kv = _block(blocks, q, gathered, step)
        return blocks.add(so_far, q, kv, mask, step), None

    so_far = blocks.own(q, kv, mask)
    so_far, _ = lax.scan(one_block, so_far, jnp.arange(1, blocks.degree))
    out, logsumexp = blocks.parts.with_sinks(so_far, sinks)
    out = checkpoint_name(out.astype(q.dtype), "attention_out")
    logsumexp = checkpoint_name(logsumexp.sum(axis=0), "attention_logsumexp")
    return out, (q, gathered, sinks, mask, out, logsumexp)


def _backward(blocks: Blocks, residuals, dout):
    q, gathered, sinks, mask, *statistics = residuals
    whole = (*statistics, dout)

    def one_block(carry, step):
        dq, dgathered = carry
        kv = _block(blocks, q, gathered, step)
        part, dkv = blocks.gradients(q, kv, mask, step, whole)
        return (dq + part, put(dgathered, dkv, step)), None

    def put(dgathered, dkv, step):
        # Every block of keys is met once: its gradient has one place.
        source = blocks.source(q, step)
        return lax.dynamic_update_index_in_dim(dgathered, dkv, source, 0)

    dq, dkv = blocks.own_gradients(q, _block(blocks, q, gathered, 0), mask, whole)
    dgathered = put(jnp.zeros(gathered.shape, jnp.float32), dkv, 0)
    steps = jnp.arange(1, blocks.degree)
    (dq, dgathered), _ = lax.scan(one_block, (dq, dgathered), steps)
    dk, dv = lax.psum_scatter(dgathered, blocks.axis_name).astype(gathered.dtype)
    dsinks = blocks.parts.sinks_gradient(sinks, *whole)
    return dq.astype(q.dtype), dk, dv, dsinks, None


_attend.defvjp(_forward, _backward)


def _block(blocks: Blocks, q: Array, gathered: Array, step: Any) -> KeysAndValues:
    source = blocks.source(q, step)
    return lax.dynamic_index_in_dim(gathered, source, 0, keepdims=False)
