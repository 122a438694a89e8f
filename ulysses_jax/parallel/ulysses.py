"""Ulysses: exchange, local attention, exchange; the paper's strategy in one file."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from ulysses_jax.mesh import AXES
from ulysses_jax.parallel.exchange import head_layout, heads_to_seq, seq_to_heads
from ulysses_jax.sharding import activation

LocalAttention = Callable[..., Array]


def ulysses(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mesh: Mesh | AbstractMesh,
    attention: LocalAttention,
    mask: Any,
    scale: float | None = None,
    head_chunks: int = 1,
) -> Float[Array, "B T N H"]:
    """Attention over a sequence that is sharded over the mesh axis `seq`.

    `[B, T/P, N, H] -> exchange -> [B, T, N/P, H] -> attention -> exchange back`, all
    inside one `jax.shard_map` over `mesh`.

    Args:
      q, k, v: global arrays; the batch is sharded over (data, fsdp), tokens over seq,
        heads over tensor, whichever of these axes the mesh has.
      mesh: a mesh; over axes that are not of this library's the arrays are whole.
      attention: `f(q, k, v, mask=..., scale=...)`, called on local heads and all
        tokens.
      mask: a pytree of arrays `[B, global length]`, handed to `attention` with the
        local part of the batch and all tokens.
      scale: handed to `attention`.
      head_chunks: the local heads are exchanged and attended in this many groups, so
        that one group's exchange can run under another's attention.

    Returns:
      The attended values, global, sharded as q should be; on a mesh with Explicit axes
      with q's own type, where that lies alike.

    Raises:
      ValueError: shapes that do not fit each other or the mesh; the message has the
        numbers and what would fit.
    """
    axes = _free_axes(mesh)
    _check_axes(q, mesh, axes)
    degree = axes.get("seq", 1)
    _check_shapes(q, k, v, axes)
    tensor = axes.get("tensor", 1)
    layout = head_layout(q.shape[2] // tensor, k.shape[2] // tensor, degree)
    kv_chunks, group_chunks = split_head_chunks(
        head_chunks, layout.num_kv_slots // degree, layout.group
    )

    def local(q, k, v, mask):
        q = layout.spread_q(q)
        k, v = layout.spread_kv(k), layout.spread_kv(v)
        if degree == 1:
            return attention(q, k, v, mask=mask, scale=scale)
        # Slots as [device, KV slot of the device, query of the slot].
        q = q.reshape(*q.shape[:2], degree, -1, layout.group, q.shape[-1])
        k = k.reshape(*k.shape[:2], degree, -1, k.shape[-1])
        v = v.reshape(*v.shape[:2], degree, -1, v.shape[-1])
        rows = []
        for q_row, k_row, v_row in zip(
            jnp.split(q, kv_chunks, axis=3),
            jnp.split(k, kv_chunks, axis=3),
            jnp.split(v, kv_chunks, axis=3),
            strict=True,
        ):
            # Each KV slot is exchanged once, however many chunks read it.
            k_all = seq_to_heads(_merge_heads(k_row))
            v_all = seq_to_heads(_merge_heads(v_row))
            cells = []
            for q_cell in jnp.split(q_row, group_chunks, axis=4):
                q_all = seq_to_heads(_merge_heads(q_cell))
                out = attention(q_all, k_all, v_all, mask=mask, scale=scale)
                cells.append(heads_to_seq(out).reshape(q_cell.shape))
            rows.append(jnp.concatenate(cells, axis=4))
        return layout.gather_q(_merge_heads(jnp.concatenate(rows, axis=3)))

    spec = activation("BTNH", axes)
    mask_spec = jax.tree.map(lambda _: activation("B", axes), mask)
    args = (q, k, v, mask)
    specs = (spec, spec, spec, mask_spec)
    is_explicit = any(
        mesh.axis_types[mesh.axis_names.index(a)] == AxisType.Explicit for a in axes
    )
    if is_explicit:
        args = jax.tree.map(
            lambda x, s: jax.sharding.reshard(x, NamedSharding(mesh, s)), args, specs
        )
    out = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=specs,
        out_specs=spec,
        # Axes of other names too: what this library does not name is whole on each.
        axis_names=_not_manual(mesh),
        # Every axis of degree > 1 shards q, k and v, so no gradient needs a sum that
        # the check would find; without it `attention` may be anybody's function.
        check_vma=False,
    )(*args)
    q_sharding = jax.typeof(q).sharding
    if is_explicit and not q_sharding.mesh.empty:
        # Axes of degree 1 make types differ that lie alike: out takes q's, so that a
        # residual sum has one type.
        if _cut_over(q_sharding.spec, axes, q.ndim) == _cut_over(spec, axes, q.ndim):
            out = jax.sharding.reshard(out, NamedSharding(mesh, q_sharding.spec))
    return out


def _cut_over(spec: P, axes: dict[str, int], num_dims: int) -> list[tuple[str, ...]]:
    """For each dim the axes that cut it, without those of degree 1."""
    dims = [() if d is None else (d,) if isinstance(d, str) else tuple(d) for d in spec]
    dims += [()] * (num_dims - len(dims))
    return [tuple(axis for axis in dim if axes.get(axis, 2) > 1) for dim in dims]


def _not_manual(mesh: Mesh | AbstractMesh) -> set[str]:
    return {
        axis
        for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind != AxisType.Manual
    }


def _free_axes(mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """The degrees of this library's axes that are not manual already."""
    degrees = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
    free = _not_manual(mesh)
    if "seq" in set(degrees) - free:
        raise ValueError(
            "ulysses_attention takes global arrays, but it is called inside a "
            "shard_map over 'seq': call seq_to_heads and heads_to_seq there"
        )
    return {axis: degrees[axis] for axis in AXES if axis in degrees and axis in free}


def _check_axes(q: Array, mesh: Mesh | AbstractMesh, axes: dict[str, int]) -> None:
    """Refuses what an axis of another name would do in silence: gather, or nothing."""
    degrees = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
    others = tuple(a for a in _not_manual(mesh) if a not in AXES and degrees[a] > 1)
    if others and "seq" not in degrees:
        raise ValueError(
            f"the mesh has axes {others} and none named seq: name the sequence's axis "
            "seq, the batch's data or fsdp, and the heads' tensor"
        )
    sharding = jax.typeof(q).sharding
    for axes_of_dim in () if sharding.mesh.empty else sharding.spec:
        for axis in (
            (axes_of_dim,) if isinstance(axes_of_dim, str) else axes_of_dim or ()
        ):
            if axis in others:
                raise ValueError(
                    f"q is sharded over the mesh axis {axis!r}, which would be "
                    "gathered: name it data or fsdp where it splits the batch, tensor "
                    "where it splits the heads"
                )


def _check_shapes(q: Array, k: Array, v: Array, axes: dict[str, int]) -> None:
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(f"q is [B, T, N, H], k and v are [B, S, K, H]; got {shapes}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q, k and v differ in batch or head size: {shapes}")
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(
            f"q, k and v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}: cast them"
        )
    if axes.get("ring", 1) > 1:
        raise ValueError(
            "ulysses_attention spreads tokens over seq alone, but "
            f"ring={axes['ring']}: use ring=1, "
            f"seq={axes['ring'] * axes.get('seq', 1)}"
        )
    batch = math.prod(axes.get(axis, 1) for axis in ("data", "fsdp"))
    for name, size, over, degree in (
        ("batch", q.shape[0], "(data, fsdp)", batch),
        ("number of query tokens", q.shape[1], "seq", axes.get("seq", 1)),
        ("number of key tokens", k.shape[1], "seq", axes.get("seq", 1)),
        ("number of query heads", q.shape[2], "tensor", axes.get("tensor", 1)),
        ("number of key/value heads", k.shape[2], "tensor", axes.get("tensor", 1)),
    ):
        if size % degree:
            more = -(-size // degree) * degree
            fits = math.gcd(size, degree)
            raise ValueError(
                f"the {name}, {size}, does not divide over {over} degree {degree}: "
                f"pad it to {more}, or use a degree of {fits}"
            )


def split_head_chunks(head_chunks: int, num_kv: int, group: int) -> tuple[int, int]:
    """Chunks over a device's KV slots, and over the queries of each: their product."""
    kv_chunks = math.gcd(head_chunks, num_kv)
    group_chunks = head_chunks // kv_chunks
    if head_chunks < 1 or group % group_chunks:
        fits = [
            n
            for n in range(1, num_kv * group + 1)
            if group % (n // math.gcd(n, num_kv)) == 0
        ]
        raise ValueError(
            f"head_chunks {head_chunks} does not divide the {num_kv * group} query "
            f"heads of a device ({num_kv} KV heads x {group}): use one of {fits}"
        )
    return kv_chunks, group_chunks


def _merge_heads(x: Array) -> Array:
    return x.reshape(*x.shape[:2], -1, x.shape[-1])
