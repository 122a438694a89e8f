"""Problems for strategies that attend block by block, and what a program sends."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ulysses_jax import make_mesh
from ulysses_jax.attend import attend
from ulysses_jax.attention.mask import Mask
from ulysses_jax.attention.parts import Parts
from ulysses_jax.attention.reference import reference_attention
from ulysses_jax.attention.select import PARTS
from ulysses_jax.costs.collectives import find_collectives
from ulysses_jax.costs.hlo import parse
from ulysses_jax.parallel.zigzag import zigzag_order
from ulysses_jax.strategies import num_members

B, T, H = 2, 32, 4
TOLERANCE = 2e-5

# Tiles smaller than half-blocks, and of no size that divides them.
SMALL_TILES = Parts(
    functools.partial(PARTS["blockwise"].forward, block_q=3, block_kv=5),
    functools.partial(PARTS["blockwise"].gradients, block_q=3, block_kv=5),
)


def both(name, ids):
    ids = jnp.asarray(ids, jnp.int32)
    return {f"q_{name}": ids, f"kv_{name}": ids}


# Documents that end inside a shard, at its end, and that are longer than one.
SEGMENTS = both("segment_ids", [[1] * 5 + [2] * 14 + [3] * 13, [1] * 16 + [2] * 16])
POSITIONS = both("positions", np.random.default_rng(0).permuted([range(T)] * B, axis=1))
MASKS = {
    "causal": Mask(causal=True),
    "window": Mask(causal=True, window=7),
    "segments": Mask(causal=True, **SEGMENTS),
    "segments and window": Mask(causal=True, window=6, **SEGMENTS),
    "positions": Mask(causal=True, window=9, **POSITIONS),
}


def mesh_of(axis_type=AxisType.Auto, **degrees):
    num = int(np.prod(list(degrees.values())))
    return make_mesh(**degrees, devices=jax.devices()[:num], axis_type=axis_type)


def inputs(num_heads, num_kv_heads, *, keys=T, dtype=jnp.float32):
    """q, k, v, and the weights that make a scalar of the output."""
    draws = jax.random.split(jax.random.key(num_heads * 100 + num_kv_heads), 4)
    sizes = ((T, num_heads), (keys, num_kv_heads), (keys, num_kv_heads), (T, num_heads))
    return tuple(
        jax.random.normal(draw, (B, tokens, heads, H), dtype)
        for draw, (tokens, heads) in zip(draws, sizes, strict=True)
    )


def out_and_gradients(attention, *arrays):
    return compiled(attention)(*arrays)


def compiled(attention):
    """`out_and_gradients` of it, compiled once for all arrays of a shape."""

    def weighted(q, k, v, weights):
        out = attention(q, k, v)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    grad = jax.jit(jax.grad(weighted, argnums=(0, 1, 2), has_aux=True))

    def run(*arrays):
        gradients, out = grad(*arrays)
        return tuple(np.asarray(x, np.float32) for x in (out, *gradients))

    return run


def assert_close(got, want, tolerance=TOLERANCE):
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=name)


@functools.cache
def oracle(mask_name, heads, kv_heads):
    """Of the dense reference, in the sequence's own order."""
    mask = MASKS[mask_name]
    attention = functools.partial(reference_attention, mask=mask)
    return out_and_gradients(attention, *inputs(heads, kv_heads))


def spread_results(
    strategy, mask_name, heads, kv_heads, *, zigzag=False, attention=None, **degrees
):
    """Of a strategy, in the sequence's own order; tokens go in as they must lie."""
    mesh, mask = mesh_of(**degrees), MASKS[mask_name]
    ring, seq = (degrees.get(axis, 1) for axis in ("ring", "seq"))
    order = np.arange(T)
    if zigzag:
        order = zigzag_order(T, num_members(strategy, ring, seq))
    mask = jax.tree.map(lambda ids: ids[:, order], mask)
    attention = functools.partial(
        attend,
        mesh=mesh,
        mask=mask,
        strategy=strategy,
        zigzag=zigzag,
        attention=attention or SMALL_TILES,
    )
    arrays = (x[:, order] for x in inputs(heads, kv_heads))
    back = np.argsort(order)
    return tuple(x[:, back] for x in out_and_gradients(attention, *arrays))


def programs(
    strategy,
    heads,
    kv_heads,
    *,
    dtype=jnp.float32,
    mask=None,
    zigzag=False,
    **degrees,
):
    """The collectives of the forward pass, and of forward and backward."""
    mesh = mesh_of(**degrees)
    spread = NamedSharding(mesh, P(None, ("ring", "seq")))
    mask = Mask(causal=True) if mask is None else mask

    def shaped(heads):
        return jax.ShapeDtypeStruct((B, T, heads, H), dtype, sharding=spread)

    def forward(q, k, v):
        return attend(q, k, v, mesh=mesh, mask=mask, strategy=strategy, zigzag=zigzag)

    def both_ways(q, k, v, upstream):
        out, pull = jax.vjp(forward, q, k, v)
        return out, pull(upstream)

    q, kv = shaped(heads), shaped(kv_heads)
    return (
        collectives(forward, mesh, q, kv, kv),
        collectives(both_ways, mesh, q, kv, kv, q),
    )


def collectives(function, mesh, *args):
    text = jax.jit(function).lower(*args).compile().as_text()
    return find_collectives(parse(text), dict(mesh.shape), gpus_per_host=8)


def counts(found):
    """How often each kind runs, over which axis; in how many arrays."""
    totals = {}
    for each in found:
        key = each.kind, each.axes
        totals[key] = totals.get(key, 0) + each.count
    return totals


def sent(found):
    """Bytes by kind and axis."""
    totals = {}
    for each in found:
        key = each.kind, each.axes
        totals[key] = totals.get(key, 0) + each.count * each.sent_bytes
    return totals


def pairs_computed(strategy, *, zigzag, **degrees):
    """How many (query, key) pairs each device's attention was given, causal masks'
    own blocks counted as their visible half: by device, in the order of the mesh."""
    mesh = mesh_of(**degrees)
    axis = "seq" if strategy == "all_gather" else "ring"
    seen = []

    def forward(q, k, v, *, mask, scale):
        size = q.shape[1] * k.shape[1]
        size = (size + q.shape[1]) // 2 if mask.causal else size
        member = jax.lax.axis_index(axis)
        jax.debug.callback(lambda member: seen.append((int(member), size)), member)
        return SMALL_TILES.forward(q, k, v, mask=mask, scale=scale)

    attention = functools.partial(
        attend,
        mesh=mesh,
        mask=Mask(causal=True),
        strategy=strategy,
        zigzag=zigzag,
        attention=Parts(forward, SMALL_TILES.gradients),
    )
    jax.block_until_ready(jax.jit(attention)(*inputs(8, 8)[:3]))
    jax.effects_barrier()
    by_member = itertools.groupby(sorted(seen), key=lambda each: each[0])
    return [sum(size for _, size in group) for _, group in by_member]
