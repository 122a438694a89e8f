"""Cross-entropy over tiles of tokens: the logits of all tokens never exist at once."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from ulysses_jax import layout
from ulysses_jax.data.tokenizer import IGNORED
from ulysses_jax.memory.tiles import over_tiles
from ulysses_jax.sharding import activation, zero_cut
from ulysses_jax.weights.gathered import (
    Gathered,
    as_cotangent,
    gradient_spec,
    is_frozen,
    slot_of,
    spec_of,
    value_of,
)
from ulysses_jax.weights.whole import sum_gradient


def cross_entropy(
    x: Float[Array, "B T D"],
    head: Float[Array, "V D"] | Gathered,
    labels: Int[Array, "B T"],
    tile_tokens: int,
) -> Float[Array, ""]:
    """The sum over valid tokens of -log softmax(x head^T)[label], in nats.

    Arguments, result and cost: as `training_loss` without smoothing and z-loss.
    """
    losses: tuple[Array, Array] = training_loss(x, head, labels, tile_tokens, 0.0, 0.0)
    return losses[0]


def training_loss(
    x: Float[Array, "B T D"],
    head: Float[Array, "V D"] | Gathered,
    labels: Int[Array, "B T"],
    tile_tokens: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """What a run minimises, and the plain cross-entropy, in nats over valid tokens.

    With s = label_smoothing, a token adds the cross-entropy of its softmax with the
    target distribution (1 - s) onehot(label) + s / V, and z_loss logsumexp^2. Both are
    sums, not means: divide by the global number of valid tokens (`num_valid`).

    Args:
      x: global activations in the compute dtype, B over (data, fsdp), T over
        (ring, seq).
      head: global float32 parameter, V over tensor, D whole or over the ZeRO axes, or
        one `Gathered`.
      labels: global, sharded as x; `IGNORED` where there is none. Others below 0, or at
        V and above, are refused where their values are there to be seen; traced, as in
        `jax.jit`, they do not count, as if they were IGNORED.
      tile_tokens: how many tokens of a device have logits at a time.

    Returns:
      The objective and the plain sum, float32 scalars, the same on every device. The
      plain one is a figure to report: it has no gradient, as under stop_gradient.
      Logits, softmax and the gradient of `head` are float32; products are in x's dtype.

    Raises:
      ValueError: labels that are no tokens of the vocabulary.

    Cost: tile_tokens V / tensor float32 a device. When differentiated, the same pass
    computes the gradients (three products a tile instead of four) and keeps them: x's
    size in x's dtype, and the head's gradient. Where D is cut, an all-gather of the
    head, and a reduce-scatter of its gradient (else an all-reduce); over tensor,
    all-reduces of per-token scalars and of x's gradient.

    Source: tiling over the sequence as in Mini-Sequence Transformer, arXiv 2407.15892;
    gradients in the forward pass as in Liger Kernel, arXiv 2410.10989; label smoothing
    as in arXiv 1512.00567, section 7; z-loss as in PaLM, arXiv 2204.02311, section 5.
    """
    check_labels(labels, value_of(head).shape[0])
    losses: tuple[Array, Array] = _training_loss(
        x, head, labels, tile_tokens, label_smoothing, z_loss
    )
    return losses


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _training_loss(x, head, labels, tile_tokens, label_smoothing, z_loss):
    losses, _, _ = _tiled(
        x, head, labels, tile_tokens, label_smoothing, z_loss, with_gradients=False
    )
    return losses


def num_valid(labels: Int[Array, "..."], vocab_size: int) -> Int[Array, ""]:
    """The global number of tokens that have a label: an integer, so never rounded.

    Counts what `training_loss` counts, and refuses what it refuses.
    """
    check_labels(labels, vocab_size)
    return jnp.sum(is_valid(labels, vocab_size), dtype=jnp.int32)


def is_valid(labels: Int[Array, "..."], vocab_size: int) -> Bool[Array, "..."]:
    return (labels >= 0) & (labels < vocab_size)  # so not IGNORED either


def check_labels(labels: Int[Array, "..."], vocab_size: int) -> None:
    if isinstance(labels, Tracer):
        return
    with jax.ensure_compile_time_eval():  # of labels that a jitted function holds
        wrong = (labels != IGNORED) & ~is_valid(labels, vocab_size)
        num, low, high = int(wrong.sum()), int(labels.min()), int(labels.max())
    if num:
        raise ValueError(
            f"{num} labels are neither tokens, 0 to {vocab_size - 1}, nor {IGNORED}, "
            f"which has no loss; they go from {low} to {high}: set those without a "
            f"loss to {IGNORED}, or make the vocabulary larger"
        )


def _forward(x, head, labels, tile_tokens, label_smoothing, z_loss):
    losses, dx, dhead = _tiled(
        x, head, labels, tile_tokens, label_smoothing, z_loss, with_gradients=True
    )
    return losses, (dx, None if is_frozen(head) else as_cotangent(head, dhead))


def _backward(tile_tokens, label_smoothing, z_loss, residuals, upstream):
    dx, dhead = residuals
    upstream, _ = upstream
    scaled = (dx.astype(jnp.float32) * upstream).astype(dx.dtype)
    return scaled, jax.tree.map(lambda gradient: gradient * upstream, dhead), None


_training_loss.defvjp(_forward, _backward)


def _tiled(
    x, head, labels, tile_tokens, label_smoothing, z_loss, *, with_gradients: bool
):
    axes = layout.axes()
    x_spec, head_spec = activation("BTD", axes), spec_of(head, "VD")
    trains_head = with_gradients and not is_frozen(head)
    dhead_spec = gradient_spec(head, "VD") if trains_head else None
    losses, dx, dhead = layout.over_devices(
        partial(
            _local_loss,
            tile_tokens=tile_tokens,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            vocab_size=value_of(head).shape[0],
            head_cut=zero_cut(head_spec),
            dhead_spec=dhead_spec,
            with_gradients=with_gradients,
        ),
        (x_spec, head_spec, activation("BT", axes)),
        (
            (P(), P()),
            x_spec if with_gradients else None,
            dhead_spec,
        ),
    )(x, value_of(head), labels)
    if with_gradients:
        dx = layout.lay_like(dx, x)
    if trains_head:
        dhead = layout.lay_like(dhead, slot_of(head))
    return losses, dx, dhead


def _local_loss(
    x,
    head,
    labels,
    *,
    tile_tokens,
    label_smoothing,
    z_loss,
    vocab_size,
    head_cut,
    dhead_spec,
    with_gradients,
):
    """One device's tokens, against its part of the vocabulary."""
    head, first = whole_width(head, x, head_cut)

    def tile(sums, labels, x):
        objective, plain, dhead = sums
        logits, logsumexp, is_label, label_logit = against_labels(
            x, head, labels - first
        )
        valid = is_valid(labels, vocab_size)
        nats = logsumexp - label_logit
        plain = plain + jnp.where(valid, nats, 0).sum()
        if label_smoothing:
            # Of differences: the sum of large logits would lose the small ones.
            below = layout.psum((logsumexp[:, None] - logits).sum(axis=-1), ("tensor",))
            nats = (1 - label_smoothing) * nats + label_smoothing / vocab_size * below
        if z_loss:
            nats = nats + z_loss * jnp.square(logsumexp)
        objective = objective + jnp.where(valid, nats, 0).sum()
        if not with_gradients:
            return (objective, plain, dhead), x
        # softmax (1 + 2 z logsumexp) - (1 - s) onehot - s / V
        dlogits = jnp.exp(logits - logsumexp[:, None])
        if z_loss:
            dlogits = dlogits * (1 + 2 * z_loss * logsumexp[:, None])
        if label_smoothing:
            dlogits = dlogits - label_smoothing / vocab_size
        dlogits = dlogits - (1 - label_smoothing) * is_label
        dlogits = jnp.where(valid[:, None], dlogits, 0).astype(x.dtype)
        if dhead is not None:
            dhead = dhead + jnp.einsum(
                "TV,TD->VD", dlogits, x, preferred_element_type=jnp.float32
            )
        dx = jnp.einsum("TV,VD->TD", dlogits, head)
        return (objective, plain, dhead), dx

    dhead = None if dhead_spec is None else jnp.zeros(head.shape, jnp.float32)
    # Nothing else reads the normed x: its gradient is written over it.
    (objective, plain, dhead), dx = over_tiles(
        tile,
        (jnp.float32(0), jnp.float32(0), dhead),
        labels.reshape(-1),
        x.reshape(labels.size, -1),
        tile_tokens=tile_tokens,
    )
    losses = layout.psum((objective, plain), ("data", "fsdp", "ring", "seq"))
    if not with_gradients:
        return losses, None, None
    dx = layout.psum(dx, ("tensor",)).reshape(x.shape)
    return losses, dx, None if dhead_spec is None else sum_gradient(dhead, dhead_spec)


def whole_width(head, x, head_cut):
    """A device's part of the vocabulary, and the id that it begins with."""
    head = layout.all_gather(head.astype(x.dtype), *head_cut)
    return head, layout.axis_index("tensor") * head.shape[0]


def against_labels(x, head, labels):
    """Of a tile: its logits, their logsumexp and where the labels are; labels count
    from the head's first row. `[T, V]`, `[T]`, `[T, V]`, and the labels' logits `[T]`.
    """
    logits = jnp.einsum("TD,VD->TV", x, head, preferred_element_type=jnp.float32)
    highest = layout.pmax(logits.max(axis=-1), ("tensor",))
    total = layout.psum(jnp.exp(logits - highest[:, None]).sum(axis=-1), ("tensor",))
    is_label = jnp.arange(head.shape[0]) == labels[:, None]
    label_logit = layout.psum(jnp.where(is_label, logits, 0).sum(axis=-1), ("tensor",))
    return logits, highest + jnp.log(total), is_label, label_logit
