"""One shard_map for every strategy: what lies where, and what shapes are refused."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from ulysses_jax.mesh import AXES
from ulysses_jax.sharding import ACTIVATION, Table, activation


def spread(
    local: Callable[[Array, Array, Array, Any, Any], Any],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Any,
    mesh: Mesh | AbstractMesh,
    table: Table = ACTIVATION,
    with_logsumexp: bool = False,
    sinks: Float[Array, "N"] | None = None,
) -> Any:
    """Runs `local(q, k, v, sinks, mask)` on every device's shards.

    Args:
      q, k, v: global; the batch is sharded over (data, fsdp), tokens over (ring, seq),
        heads over tensor, whichever of these axes the mesh has.
      mask: a pytree of arrays `[B, global length]`: a device has its part of the batch
        and all tokens.
      mesh: over axes that are not of this library's the arrays are whole; an empty one
        is one device.
      table: of `sharding`; under MEGATRON a device has all tokens of its heads.
      with_logsumexp: `local` returns a pair, whose second is `[B, T, N]`.
      sinks: global; a device has those of its heads before any exchange.

    Returns:
      The global result, sharded as q should be; on a mesh with Explicit axes with q's
      own type, where that lies alike. With the logsumexp a pair.
    """
    if mesh.empty:
        return local(q, k, v, sinks, mask)
    axes = free_axes(mesh)
    spec = activation("BTNH", axes, table)
    mask_spec = jax.tree.map(lambda _: activation("B", axes), mask)
    sinks_spec = jax.tree.map(lambda _: activation("N", axes, table), sinks)
    specs = (spec, spec, spec, sinks_spec, mask_spec)
    out_specs = (spec, activation("BTN", axes, table)) if with_logsumexp else spec
    results = map_shards(local, (q, k, v, sinks, mask), specs, out_specs, mesh)
    out, *more = results if with_logsumexp else (results,)
    out = laid_like(out, q, spec, mesh)
    return (out, *more) if more else out


def map_shards(
    local: Callable[..., Any],
    args: tuple[Any, ...],
    specs: tuple[Any, ...],
    out_specs: Any,
    mesh: Mesh | AbstractMesh,
) -> Any:
    """Runs `local(*args)` on every device's shards, on Explicit and on Auto axes.

    Args:
      args: global; the first lies over every axis that cuts anything, and the last has
        no gradient.
      specs: a spec for every array of `args`.
      mesh: not empty; those of its axes that are not manual already.
    """
    axes = free_axes(mesh)
    if _is_explicit(mesh, axes):
        args = jax.tree.map(
            lambda x, s: jax.sharding.reshard(x, NamedSharding(mesh, s)), args, specs
        )
    run = partial(
        jax.shard_map,
        mesh=mesh,
        # Axes of other names too: what this library does not name is whole on each.
        axis_names=_not_manual(mesh),
        # Every axis of degree > 1 shards q, k and v, whose gradients need no sum; that
        # of sinks is summed over axes that do not cut them, with the check or without.
        # Without it `attention` may be anybody's function.
        check_vma=False,
    )
    varying = frozenset().union(*map(_varying, jax.tree.leaves(args)))
    if varying:
        return _inside(run, local, specs, out_specs, tuple(varying), args)
    return run(local, in_specs=specs, out_specs=out_specs)(*args)


def laid_like(out: Array, like: Array, spec: P, mesh: Mesh | AbstractMesh) -> Array:
    """What lies as `spec`; on Explicit axes with the type of `like`, if that is alike.

    Axes of degree 1 make types differ that lie alike: so a residual sum has one type.
    """
    axes, sharding = free_axes(mesh), jax.typeof(like).sharding
    if _is_explicit(mesh, axes) and not sharding.mesh.empty:
        if _cut_over(sharding.spec, axes, like.ndim) == _cut_over(spec, axes, out.ndim):
            return jax.sharding.reshard(out, NamedSharding(mesh, sharding.spec))
    return out


def _is_explicit(mesh: Mesh | AbstractMesh, axes: dict[str, int]) -> bool:
    return any(
        mesh.axis_types[mesh.axis_names.index(a)] == AxisType.Explicit for a in axes
    )


def _inside(
    run: partial, local: Callable, specs: Any, out_specs: Any, varying: Any, args: Any
) -> Any:
    """`run` inside a caller's `shard_map` whose types say what varies over its axes.

    What a map without the check returns varies over none, by its type, and JAX refuses
    its gradients. So each pass is a map of its own, and the types are put back.
    """
    axes = tuple(sorted(run.keywords["axis_names"]))
    residual = P(axes)  # what a device keeps, in a dim of its own
    treedef: Any = None

    def typed(tree: Any) -> Any:
        def vary(x: Array) -> Array:
            over = tuple(axis for axis in varying if axis not in _varying(x))
            return jax.lax.pcast(x, over, to="varying") if over else x

        return jax.tree.map(vary, tree)

    def untyped(tree: Any) -> Any:
        """Inside `run`, where every operation's result varies over nothing."""
        return jax.tree.map(lambda x: x[None][0], tree)

    @jax.custom_vjp
    def call(*args):
        return typed(run(local, in_specs=specs, out_specs=out_specs)(*args))

    def forward(*args):
        def one(*args):
            nonlocal treedef
            *args, mask = untyped(args)
            out, pullback = jax.vjp(lambda *args: local(*args, mask), *args)
            kept, treedef = jax.tree.flatten(pullback)
            return out, [x[None] for x in kept]

        maps = run(one, in_specs=specs, out_specs=(out_specs, residual))
        return typed(maps(*args))

    def backward(kept, upstream):
        def one(kept, upstream):
            pullback = jax.tree.unflatten(treedef, [x[0] for x in kept])
            gradients = pullback(untyped(upstream))
            return jax.tree.map(whole, gradients, specs[:-1])

        def whole(gradient: Array, spec: P) -> Array:
            """Of q, k and v a device has its own; of sinks, its queries' part."""
            over = tuple(_axes_of(specs[0]) - _axes_of(spec))
            return jax.lax.psum(gradient, over) if over else gradient

        maps = run(one, in_specs=(residual, out_specs), out_specs=specs[:-1])
        return *typed(maps(kept, upstream)), None

    call.defvjp(forward, backward)
    return call(*typed(args))


def own_heads(
    q: Float[Array, "B t N H"], mesh: Mesh | AbstractMesh, table: Table = ACTIVATION
) -> Int[Array, "N"]:
    """The numbers of a device's query heads before any exchange, inside `spread`."""
    numbers = jnp.arange(q.shape[2], dtype=jnp.int32)
    axes = {} if mesh.empty else free_axes(mesh)
    (over,) = activation("N", axes, table) or (None,)
    if over is None:
        return numbers
    # Tied to q, as `parallel.blocks.Blocks.member` is.
    index, _ = jax.lax.optimization_barrier((jax.lax.axis_index(over), q[:1, :1]))
    return index * q.shape[2] + numbers


def _axes_of(spec: P | None) -> set[str]:
    dims = ((d,) if isinstance(d, str) else d or () for d in spec or ())
    return {axis for dim in dims for axis in dim}


def _varying(x: Array) -> frozenset[str]:
    """The manual axes over which it may differ, by its type."""
    return jax.typeof(x).manual_axis_type.varying


def check_arrays(
    q: Array, k: Array, v: Array, mesh: Mesh | AbstractMesh
) -> dict[str, int]:
    """Checks global arrays against the mesh; returns the degrees of its axes.

    Raises:
      ValueError: shapes that do not fit each other or the mesh; the message has the
        numbers and what would fit.
    """
    axes = free_axes(mesh)
    check_axes(q, mesh, axes)
    _check_shapes(q, k, v, axes)
    return axes


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


def free_axes(mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """The degrees of this library's axes that are not manual already."""
    degrees = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
    free = _not_manual(mesh)
    for axis in sorted({"ring", "seq"} & set(degrees) - free):
        raise ValueError(
            "ulysses_attention takes global arrays, but it is called inside a "
            f"shard_map over {axis!r}: call seq_to_heads and heads_to_seq there"
        )
    return {axis: degrees[axis] for axis in AXES if axis in degrees and axis in free}


def check_axes(q: Array, mesh: Mesh | AbstractMesh, axes: dict[str, int]) -> None:
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


BATCH, TOKENS, HEADS = "(data, fsdp)", "seq", "tensor"
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def _check_shapes(q: Array, k: Array, v: Array, axes: dict[str, int]) -> None:
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(f"q is [B, T, N, H], k and v are [B, S, K, H]; got {shapes}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q, k and v differ in batch or head size: {shapes}")
    if k.shape[2] < 1 or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"num_kv_heads {k.shape[2]} does not divide num_heads {q.shape[2]}: each "
            "key/value head serves the same number of query heads"
        )
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(
            f"q, k and v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}: cast them"
        )
    if q.dtype not in DTYPES:
        raise ValueError(
            "q, k and v are float32, bfloat16 or float16, and are summed in float32, "
            f"not {q.dtype}: cast them, and what comes back"
        )
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(
            f"there is nothing to attend to or with in {shapes}: leave the call out "
            "where a dim is 0"
        )
    check_divides(
        axes,
        ("batch", q.shape[0], BATCH),
        ("number of query tokens", q.shape[1], TOKENS),
        ("number of key tokens", k.shape[1], TOKENS),
        ("number of query heads", q.shape[2], HEADS),
        ("number of key/value heads", k.shape[2], HEADS),
    )


def check_divides(axes: dict[str, int], *dims: tuple[str, int, str]) -> None:
    """Refuses sizes that the axes do not divide.

    Args:
      dims: for each its name, its size, and BATCH, TOKENS or HEADS.

    Raises:
      ValueError: with the numbers and what would fit.
    """
    ring, seq = axes.get("ring", 1), axes.get("seq", 1)
    degrees = {
        BATCH: math.prod(axes.get(axis, 1) for axis in ("data", "fsdp")),
        TOKENS: ring * seq,
        HEADS: axes.get("tensor", 1),
    }
    for name, size, over in dims:
        degree = degrees[over]
        if size % degree:
            fits = math.gcd(size, degree)
            use = f"a degree of {fits}"
            if over == TOKENS and ring > 1:
                over = f"ring {ring} x seq {seq}, in all"
                r = math.gcd(size, ring)
                s = math.gcd(size // r, seq)
                meshes = (f"ring={r}, seq={s}", f"ring=1, seq={fits}")
                use = ", or ".join(dict.fromkeys(meshes))
            if name == "number of key/value heads":
                use = f"{use}, or repeat each {degree // fits} times"
            elif over != HEADS:
                # Heads padded by themselves would read other key/value heads.
                use = f"{use}, or pad it to {-(-size // degree) * degree}"
            raise ValueError(
                f"the {name}, {size}, does not divide over {over} degree {degree}: "
                f"use {use}"
            )
