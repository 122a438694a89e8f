"""Cross-entropy over tiles of tokens: the logits of all tokens never exist at once."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import get_abstract_mesh
from jaxtyping import Array, Float, Int

from ulysses_jax.data.tokenizer import IGNORED
from ulysses_jax.models.linear import all_gather, sum_gradient
from ulysses_jax.sharding import activation, parameter, zero_axes


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def cross_entropy(
    x: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    labels: Int[Array, "B T"],
    tile_tokens: int,
) -> Float[Array, ""]:
    """The sum over valid tokens of -log softmax(x head^T)[label], in nats.

    A sum, not a mean: divide by the global number of valid tokens (`num_valid`).

    Args:
      x: global activations in the compute dtype, B over (data, fsdp), T over
        (ring, seq).
      head: global float32 parameter, V over tensor, D over the ZeRO axes.
      labels: global, sharded as x; `IGNORED` where there is none.
      tile_tokens: how many tokens of a device have logits at a time.

    Returns:
      A float32 scalar, the same on every device. Logits, softmax and the gradient of
      `head` are float32; products are in x's dtype.

    Cost: tile_tokens V / tensor float32 a device. When differentiated, the same pass
    computes the gradients (three products a tile instead of four) and keeps them: x's
    size in x's dtype, and the head's gradient. An all-gather of the head and a
    reduce-scatter of its gradient; over tensor, all-reduces of per-token scalars and of
    x's gradient.

    Source: tiling over the sequence as in Mini-Sequence Transformer, arXiv 2407.15892;
    gradients in the forward pass as in Liger Kernel, arXiv 2410.10989.
    """
    loss, _, _ = _tiled(x, head, labels, tile_tokens, with_gradients=False)
    return loss


def num_valid(labels: Int[Array, "..."]) -> Int[Array, ""]:
    """The global number of tokens that have a label: an integer, so never rounded."""
    return jnp.sum(labels != IGNORED, dtype=jnp.int32)


def _forward(x, head, labels, tile_tokens):
    loss, dx, dhead = _tiled(x, head, labels, tile_tokens, with_gradients=True)
    return loss, (dx, dhead)


def _backward(tile_tokens, residuals, upstream):
    dx, dhead = residuals
    scaled = (dx.astype(jnp.float32) * upstream).astype(dx.dtype)
    return scaled, dhead * upstream, None


cross_entropy.defvjp(_forward, _backward)


def _tiled(x, head, labels, tile_tokens, *, with_gradients):
    axes = get_abstract_mesh().shape
    zero = zero_axes(head.shape[1], axes)
    x_spec = activation("BTD", axes)
    head_spec = parameter("VD", head.shape, axes)
    return jax.shard_map(
        partial(
            _local_loss,
            tile_tokens=tile_tokens,
            zero=zero,
            with_gradients=with_gradients,
        ),
        in_specs=(x_spec, head_spec, activation("BT", axes)),
        out_specs=(
            jax.sharding.PartitionSpec(),
            x_spec if with_gradients else None,
            head_spec if with_gradients else None,
        ),
        check_vma=False,
    )(x, head, labels)


def _local_loss(x, head, labels, *, tile_tokens, zero, with_gradients):
    """One device's tokens, against its part of the vocabulary."""
    shape = x.shape
    head = all_gather(head.astype(x.dtype), zero, dim=1)
    first = lax.axis_index("tensor") * head.shape[0]

    num_tokens = labels.size
    tile_tokens = min(tile_tokens, num_tokens)
    num_tiles = math.ceil(num_tokens / tile_tokens)
    padding = num_tiles * tile_tokens - num_tokens
    x = jnp.pad(x.reshape(num_tokens, -1), ((0, padding), (0, 0)))
    labels = jnp.pad(labels.reshape(-1), (0, padding), constant_values=IGNORED)
    tiles = (
        x.reshape(num_tiles, tile_tokens, -1),
        labels.reshape(num_tiles, tile_tokens),
    )

    def tile(carry, inputs):
        loss, dhead = carry
        x, labels = inputs
        logits = jnp.einsum("TD,VD->TV", x, head, preferred_element_type=jnp.float32)
        highest = lax.pmax(logits.max(axis=-1), "tensor")
        sums = lax.psum(jnp.exp(logits - highest[:, None]).sum(axis=-1), "tensor")
        logsumexp = highest + jnp.log(sums)
        is_label = jnp.arange(head.shape[0]) == (labels - first)[:, None]
        label_logit = lax.psum(jnp.where(is_label, logits, 0).sum(axis=-1), "tensor")
        valid = labels != IGNORED
        loss = loss + jnp.where(valid, logsumexp - label_logit, 0).sum()
        if not with_gradients:
            return (loss, dhead), None
        dlogits = jnp.exp(logits - logsumexp[:, None]) - is_label
        dlogits = jnp.where(valid[:, None], dlogits, 0).astype(x.dtype)
        dhead = dhead + jnp.einsum(
            "TV,TD->VD", dlogits, x, preferred_element_type=jnp.float32
        )
        return (loss, dhead), jnp.einsum("TV,VD->TD", dlogits, head)

    dhead = jnp.zeros(head.shape, jnp.float32) if with_gradients else None
    (loss, dhead), dx = lax.scan(tile, (jnp.float32(0), dhead), tiles)
    loss = lax.psum(loss, ("data", "fsdp", "ring", "seq"))
    if dhead is None or dx is None:
        return loss, None, None
    dx = lax.psum(dx.reshape(-1, shape[-1])[:num_tokens], "tensor")
    return loss, dx.reshape(shape), sum_gradient(dhead, zero, dim=1)
