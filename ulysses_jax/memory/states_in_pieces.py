"""A layer of a state in pieces, recurrence and feed-forward together, with a backward
pass of its own."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from ulysses_jax import layout
from ulysses_jax.attention import convolution
from ulysses_jax.config import Memory
from ulysses_jax.lengths import divisor_near
from ulysses_jax.memory.tiles import add, cut, over_row_tiles, write
from ulysses_jax.parallel.states import AxisNames, state_before, with_before
from ulysses_jax.recur import begins_of
from ulysses_jax.sharding import ACTIVATION, activation
from ulysses_jax.weights.whole import (
    Unbound,
    Values,
    gather,
    gradient_specs,
    laid_as,
    scatter,
    specs_of,
)

Tree = Any
End = tuple[Array, Float[Array, "B N H V"]]
"""What tokens make of a state that they find, and what they leave where it is 0."""


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def states_in_pieces(
    layer: Unbound,
    memory: Memory,
    x: Float[Array, "B T D"],
    values: Values,
    segment_ids: Int[Array, "B T"] | None,
) -> Float[Array, "B T D"]:
    """A `models.Layer` of a kind with `inputs`, `recurrence` and `project_out`, for
    `sequence_chunk_tokens` of a device's tokens at a time.

    Where tokens are spread, first what each piece makes of a state, joined to what the
    shard does, and exchanged as `parallel.states` does; then piece by piece, from the
    state before, all of the layer, its feed-forward for `mlp_tile_tokens` at a time.
    The backward pass does the first again, so that it knows the state before every
    piece, and pulls the pieces back from the last one on; then what went before the
    exchange.

    Args:
      x: global, compute dtype, B over (data, fsdp), T over (ring, seq).
      values: of the layer's parameters, as for `memory.layer_in_pieces`.
      segment_ids: global.

    Returns:
      As x.

    Raises:
      ValueError: pieces that do not divide a device's tokens, or have fewer than the
        kind reads of those before.

    Cost: keeps x alone. Forward: x, which becomes the result; backward: also dx, the
    states of all pieces, and their changes; the rest is of a piece. Weights are
    gathered once a pass. Over shards keys, values and their states are computed twice
    forward and twice more backward. States are exchanged as without pieces; of a
    convolution the last tokens of x, `(W - 1) D` numbers a row.
    """
    return _run(layer, memory, x, values, segment_ids)


def _run(layer, memory, x, values, segment_ids):
    specs, given = _specs_and_given(layer, x, values, segment_ids)

    def local(x, *given):
        pieces, leaves = _take_apart(layer, memory, x, specs[1], *given)
        return forward(pieces, leaves, x)

    return layout.over_devices(local, specs, specs[0])(x, *given)


def _forward(layer, memory, x, values, segment_ids):
    y = _run(layer, memory, x, values, segment_ids)
    return y, (x, values, segment_ids)


def _backward(layer, memory, residuals, dy):
    x, values, segment_ids = residuals
    specs, given = _specs_and_given(layer, x, values, segment_ids)

    def local(dy, x, *given):
        pieces, leaves = _take_apart(layer, memory, x, specs[1], *given)
        dx, sums = backward(pieces, leaves, x, dy)
        return dx, scatter(layer, sums, specs[1])

    dx, gradients = layout.over_devices(
        local, (specs[0], *specs), (specs[0], gradient_specs(specs[1]))
    )(dy, x, *given)
    return dx, laid_as(values, gradients), None


states_in_pieces.defvjp(_forward, _backward)


def _specs_and_given(layer, x, values, segment_ids):
    """The specs of x and of what a device is given beside it, and that: the values, the
    log decays of all heads where the kind has them, whether it is the first shard, and
    the segment ids."""
    axes = layout.axes()
    decays = layer.bind(values).attention.decays()
    if decays is not None:
        decays = jnp.log(jnp.asarray(decays, jnp.float32))
    over = layout.present(ACTIVATION.tokens)
    is_first = jnp.arange(layout.degree(*ACTIVATION.tokens)) == 0
    specs = (
        activation("BTD", axes),
        specs_of(layer, values),
        None if decays is None else activation("N", axes),
        P(over or None),
        None if segment_ids is None else activation("BT", axes),
    )
    return specs, (values, decays, is_first, segment_ids)


@dataclass(frozen=True)
class _Pieces:
    """A layer as functions of a device's pieces, for the two passes below.

    leaves are what gradients are taken of: float32 arrays.

    end: `f(leaves, before [B, w, D], x [B, c, D], i) -> End`, of piece i, after the
      last w tokens of the one before.
    mixed: `f(leaves, before, x, state, i) -> (x, state)`: the layer up to its
      feed-forward, from the state before; and the one that is left.
    finish: `f(leaves, x) -> x`, the feed-forward.
    name, apply: of the recurrence.
    over: the axes over which tokens are spread.
    number, size: of pieces, and the tokens of one.
    tokens_before: w.
    tile_tokens: of all rows of a piece together, of finish; at most.
    """

    end: Callable[..., End]
    mixed: Callable[..., tuple[Array, Array]]
    finish: Callable[..., Array]
    name: str
    apply: Callable[[Array, Array], Array]
    over: AxisNames
    number: int
    size: int
    tokens_before: int
    tile_tokens: int

    def start_of(self, i: Array) -> Array:
        return i * self.size

    def last_tokens(self, x: Float[Array, "B t D"]) -> Float[Array, "P B w D"]:
        x = x.reshape(len(x), self.number, self.size, -1)
        return jnp.moveaxis(x[:, :, self.size - self.tokens_before :], 1, 0)

    def befores(self, last: Float[Array, "P B w D"]) -> Float[Array, "P B w D"]:
        """The tokens before each piece, of the last ones of all: the first piece's are
        the shard's before."""
        if not self.tokens_before:
            return last
        with jax.named_scope(convolution.NAME):
            came = with_before(last[-1], self.tokens_before, self.over)
        return jnp.concatenate((came[None, :, : self.tokens_before], last[:-1]))

    def ends(self, leaves: Tree, x: Array, befores: Array) -> End:
        """Of all pieces, each with a leading dim."""

        def one_piece(_, inputs):
            i, before = inputs
            part = cut(x, self.start_of(i), self.size)
            return None, self.end(leaves, before, part, i)

        return lax.scan(one_piece, None, (jnp.arange(self.number), befores))[1]

    def then(self, end: End, state: Array) -> Array:
        """The state that is left by tokens with this end."""
        return self.apply(end[0], state) + end[1]

    def before_shard(self, ends: End) -> Float[Array, "B N H V"]:
        """The state that all shards before this one leave."""

        def join(so_far, end):
            return (self.apply(end[0], so_far[0]), self.then(end, so_far[1])), None

        first, others = (jax.tree.map(lambda a, p=p: a[p], ends) for p in _FIRST_OTHERS)
        change, state = lax.scan(join, first, others)[0]
        with jax.named_scope(self.name):
            return state_before(change, state, apply=self.apply, axis_names=self.over)

    def no_state(self, leaves: Tree, x: Array, befores: Array) -> Array:
        part = cut(x, jnp.int32(0), self.size)
        _, state = jax.eval_shape(self.end, leaves, befores[0], part, jnp.int32(0))
        return jnp.zeros(state.shape, state.dtype)


_FIRST_OTHERS = 0, slice(1, None)


def forward(
    pieces: _Pieces, leaves: Tree, x: Float[Array, "B t D"]
) -> Float[Array, "B t D"]:
    """The layer's result, of local x."""
    befores = pieces.befores(pieces.last_tokens(x))
    if pieces.over:
        start = pieces.before_shard(pieces.ends(leaves, x, befores))
    else:
        start = pieces.no_state(leaves, x, befores)

    def one_piece(carry, inputs):
        (x, state), (i, before) = carry, inputs
        part = cut(x, pieces.start_of(i), pieces.size)
        middle, state = pieces.mixed(leaves, before, part, state, i)

        def one_tile(_, _tokens, x):
            return None, pieces.finish(leaves, x)

        _, part = over_row_tiles(
            one_tile, None, None, middle, tile_tokens=pieces.tile_tokens
        )
        return (write(x, part, pieces.start_of(i)), state), None

    numbers = jnp.arange(pieces.number)
    return lax.scan(one_piece, (x, start), (numbers, befores))[0][0]


def backward(
    pieces: _Pieces, leaves: Tree, x: Float[Array, "B t D"], dy: Float[Array, "B t D"]
) -> tuple[Float[Array, "B t D"], Tree]:
    """dx, and the gradients of the leaves over this device's tokens, float32."""
    numbers = jnp.arange(pieces.number)
    befores, pull_befores = jax.vjp(pieces.befores, pieces.last_tokens(x))
    ends = pull_start = None
    if pieces.over:
        ends = pieces.ends(leaves, x, befores)
        start, pull_start = jax.vjp(pieces.before_shard, ends)
    else:
        start = pieces.no_state(leaves, x, befores)

    def next_state(state, inputs):
        i, before, end = inputs
        if end is not None:
            return pieces.then(end, state), state
        part = cut(x, pieces.start_of(i), pieces.size)
        return pieces.mixed(leaves, before, part, state, i)[1], state

    _, starts = lax.scan(next_state, start, (numbers, befores, ends))

    def pull_piece(carry, inputs):
        (dx, dstate, sums), (i, before, start) = carry, inputs
        part, dpart = cut((x, dx), pieces.start_of(i), pieces.size)
        (middle, _), pull = jax.vjp(
            partial(pieces.mixed, i=i), leaves, before, part, start
        )

        def pull_tile(sums, middle, dy):
            _, pull = jax.vjp(pieces.finish, leaves, middle)
            dleaves, dmiddle = pull(dy)
            return add(sums, dleaves), dmiddle

        sums, dmiddle = over_row_tiles(
            pull_tile, sums, middle, dpart, tile_tokens=pieces.tile_tokens
        )
        dleaves, dbefore, dpart, dstate = pull((dmiddle, dstate))
        dx = write(dx, dpart, pieces.start_of(i))
        return (dx, dstate, add(sums, dleaves)), dbefore

    sums = jax.tree.map(jnp.zeros_like, leaves)
    (dx, dstart, sums), dbefores = lax.scan(
        pull_piece,
        (dy, jnp.zeros_like(start), sums),
        (numbers, befores, starts),
        reverse=True,
    )

    def pull_end(carry, inputs):
        (dx, sums), (i, before, dend) = carry, inputs
        part, dpart = cut((x, dx), pieces.start_of(i), pieces.size)
        _, pull = jax.vjp(partial(pieces.end, i=i), leaves, before, part)
        dleaves, dbefore, more = pull(dend)
        dx = write(dx, dpart + more, pieces.start_of(i))
        return (dx, add(sums, dleaves)), dbefore

    if pull_start is not None:
        (dends,) = pull_start(dstart)
        (dx, sums), more = lax.scan(pull_end, (dx, sums), (numbers, befores, dends))
        dbefores += more

    def add_last(dx, inputs):
        i, dlast = inputs
        start = pieces.start_of(i + 1) - pieces.tokens_before
        last = cut(dx, start, pieces.tokens_before)
        return write(dx, last + dlast, start), None

    if pieces.tokens_before:
        (dlast,) = pull_befores(dbefores)
        dx, _ = lax.scan(add_last, dx, (numbers, dlast))
    return dx, sums


def _take_apart(
    layer: Unbound,
    memory: Memory,
    x: Float[Array, "B t D"],
    specs: tuple[Any, ...],
    values: Values,
    decays: Float[Array, "N"] | None,
    is_first: Bool[Array, "1"],
    segment_ids: Int[Array, "B t"] | None,
) -> tuple[_Pieces, list[Array | None]]:
    """A `models.Layer` as pieces, and what their gradients are taken of; all local."""
    leaves, bound = gather(layer, values, specs, x.dtype)
    kind = bound(leaves).attention
    rule, width = kind.recurrence, kind.tokens_before
    rows, tokens, _ = x.shape
    size = min(memory.sequence_chunk_tokens or tokens, tokens)
    if tokens % size or size < width:
        why = (
            f"does not divide the {tokens} tokens of a device"
            if tokens % size
            else f"is less than the {width} tokens before that a convolution reads"
        )
        raise ValueError(
            f"memory.sequence_chunk_tokens {size} {why}: use "
            + str(
                divisor_near(tokens, size, width)
                or f"longer sequences, of {width} tokens a device or more"
            )
        )
    over = tuple(a for a in layout.present(ACTIVATION.tokens) if layout.degree(a) > 1)
    reach = max(width, 1)
    with jax.named_scope(rule.name):
        documents = _documents(segment_ids, (rows, tokens), reach, is_first, over)
    # Tied to x: else JAX computes what depends on them alone, as masks of a feature
    # each, before a scan over layers, and keeps those of all pieces.
    documents, _ = lax.optimization_barrier((documents, x[:1, :1]))

    def inputs(layer, before, x, i):
        """The recurrence's arrays, the gate, and where documents begin."""
        ids = cut(documents, i * size, reach + size)
        own_and_before = ids[:, reach - width :]
        normed = layer.attention_norm(jnp.concatenate((before, x), axis=1))

        def convolved(x, taps):
            return convolution.convolve(x, taps, own_and_before)

        arrays, gate = layer.attention.inputs(normed, convolved)
        *arrays, gate = (each[:, -size:] for each in (*arrays, gate))
        arrays = (*arrays, *(() if decays is None else (decays,)))
        return arrays, gate, begins_of(ids[:, reach - 1 :])

    def end(leaves, before, x, i):
        (_, *others), _, begins = inputs(bound(leaves), before, x, i)
        shard = rule.shard((None, *others), begins, is_alone=False)
        return shard.change, shard.state

    def mixed(leaves, before, x, state, i):
        layer = bound(leaves)
        arrays, gate, begins = inputs(layer, before, x, i)
        shard = rule.shard(arrays, begins, is_alone=True, start=state)
        out = shard.out.astype(x.dtype)
        attended = layer.attention.project_out(x, out, gate)
        return layer.add_attention(x, attended), shard.state

    return _Pieces(
        end=end,
        mixed=mixed,
        finish=lambda leaves, x: bound(leaves).add_feed_forward(x),
        name=rule.name,
        apply=rule.apply,
        over=over,
        number=tokens // size,
        size=size,
        tokens_before=width,
        tile_tokens=memory.mlp_tile_tokens or size * rows,
    ), leaves


def _documents(
    segment_ids: Int[Array, "B t"] | None,
    shape: tuple[int, int],
    reach: int,
    is_first: Bool[Array, "1"],
    over: AxisNames,
) -> Int[Array, "B reach+t"]:
    """Segment ids, with those of the tokens before, which of the sequence's first one
    are of another document."""
    ids = jnp.zeros(shape, jnp.int32) if segment_ids is None else segment_ids
    before = ids[:, :1]
    if segment_ids is not None and over:
        before = with_before(ids, reach, over)[:, :reach]
    before = jnp.broadcast_to(before, (shape[0], reach))
    before = jnp.where(is_first, ids[:, :1] - 1, before)
    return jnp.concatenate((before, ids), axis=1)
