"""The one function for people with a model of their own."""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.errors import JaxRuntimeError
from jax.sharding import AbstractMesh, AxisType, Mesh
from jaxtyping import Array, Float, Int

from ulysses_jax.attend import attend
from ulysses_jax.attention.block_layout import BlockLayout
from ulysses_jax.attention.mask import Mask
from ulysses_jax.attention.parts import Parts
from ulysses_jax.ids import int32_ids
from ulysses_jax.parallel.ulysses import LocalAttention
from ulysses_jax.sharding import activation

PerToken = Int[Array, "B T"]


def ulysses_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mesh: Mesh | AbstractMesh | None = None,
    attention: LocalAttention | Parts | None = None,
    causal: bool = True,
    window: int | None = None,
    segment_ids: PerToken | tuple[PerToken, Int[Array, "B S"]] | None = None,
    positions: PerToken | tuple[PerToken, Int[Array, "B S"]] | None = None,
    layout: BlockLayout | None = None,
    scale: float | Float[Array, ""] | None = None,
    head_chunks: int = 1,
    return_logsumexp: bool = False,
    sinks: Float[Array, "N"] | None = None,
) -> Any:
    """Attends over a sequence that is spread over the mesh axes `ring` and `seq`.

    `[B, T/P, N, H] -> all-to-all -> [B, T, N/P, H] -> attention -> all-to-all back`.
    Over a ring of degree R, P devices hold T/R tokens each, and blocks of keys go round
    (ring attention). Works under jit, grad, checkpoint and scan, on meshes with
    Explicit or Auto axes; without jit too, where the second call with the same shapes
    compiles nothing.

    Args:
      q: global `[B, T, N, H]`, float32, bfloat16 or float16.
      k, v: global `[B, S, K, H]`, q's dtype; query head n reads KV head n // (N/K).
      mesh: with an axis named `seq` of degree P, and any of `ring` (it splits T, before
        seq does), `data`, `fsdp` (they split B) and `tensor` (it splits N and K, before
        seq does). Over axes with other names the arrays are whole: name a batch axis
        `data`. None: the mesh set with `jax.set_mesh`.
      attention: what a device computes, `f(q, k, v, mask=..., scale=...)` on
        `[B, T, N/P, H]`; `mask` is a `ulysses_jax.attention.mask.Mask`. None: the best
        for the mesh's devices that honours the mask
        (`ulysses_jax.attention.select.choose` says which). Over a ring, a
        `ulysses_jax.attention.parts.Parts`: an attention to some keys at a time.
        Without jit a plain function is compiled once; one that holds something (a
        closure, a method, a module) at every call, as what it holds may have changed.
      causal: a query sees keys at its own position and before. Where T != S, both count
        from 0.
      window: a query sees keys fewer than this many positions away.
      segment_ids: integers, global `[B, T]` (or a pair, `[B, T]` and `[B, S]`): tokens
        see only tokens of their own segment. JAX arrays of a dtype that int32 holds;
        of NumPy arrays the values are looked at.
      positions: integers, global, shaped likewise: what `causal` and `window` compare.
        None: 0, 1, 2, ...
      layout: block-sparse attention: which blocks of keys each block of queries sees,
        of what the other arguments show it; for all heads, or each head its own
        (`ulysses_jax.attention.layouts`: fixed, strided, longformer, bigbird; or a
        `block_layout.BlockLayout` of any array). Blocks count tokens in the sequence's
        order. Known before anything is compiled; only its blocks are computed.
      scale: of the logits; None: H**-0.5. A number is part of the program; a scalar
        array may be traced or learned, and is multiplied into q, in float32.
      head_chunks: exchange and attend the local heads in this many groups, one group's
        exchange free to run under another's attention.
      return_logsumexp: return the logsumexp of every query's logits as well.
      sinks: global `[N]`, float32 or bfloat16, traced or learned: a logit a query head
        of one more key, which every query of the head sees and whose value is 0. It
        takes its share of the softmax, in float32, and has a gradient, summed over all
        queries. With a function given as `attention` there are none; a `Parts` has
        them, over a ring or not.

    Returns:
      `[B, T, N, H]`, q's dtype, B over (data, fsdp), T over (ring, seq), N over
      tensor. A query that sees no key gives 0. On Hopper GPUs a row whose keys do not
      lie in order (`attention.ranges.key_ranges`) gives NaN, where cuDNN has not the
      mask: use `attention=blockwise_attention`. With `return_logsumexp` a pair: that,
      and float32 `[B, T, N]`, which lies alike and has a gradient; -1e30 for a query
      that sees no key, or its sink.

    Raises:
      ValueError: dims that do not fit each other or the mesh, with the numbers and what
        would fit; an argument that is not what is said here.

    Cost: with e bytes an element and g = N/K, each device receives
    (2 + 2/g) (T D / P) (P-1)/P e bytes a row of the batch forward for D = N H and
    P <= K, in four all-to-alls, and as much backward. Where P > K each KV head is
    repeated P/K times, so k and v cost as if K were P. Where the heads do not divide
    over P, query heads are padded to the next number of slots that does
    (`parallel.exchange.head_layout`): exchange and attention then cost slots / N times
    as much, e.g. 8/6 for 6 heads over 4 devices. `parallel.bytes.received_bytes` has
    the formulas, those of a ring too. Under a causal mask the members of a ring work
    unequally: the last one has all the work there is, 2 - 1/R times the mean. Sinks
    cost one pass over the output and, backward, an all-reduce of N numbers.

    Source: DeepSpeed-Ulysses, arXiv 2309.14509; repeated KV heads as in ALST,
    arXiv 2506.13996; ring attention, arXiv 2310.01889; sinks as in gpt-oss,
    arXiv 2508.10925.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not hasattr(x, "shape"):
            raise ValueError(f"{name} is an array, not {type(x).__name__}")
    mesh = mesh_for(mesh, q)
    q_segments, kv_segments = _pair(segment_ids, "segment_ids", q, k)
    q_positions, kv_positions = _pair(positions, "positions", q, k)
    mask = Mask(
        causal=causal,
        window=window,
        q_segment_ids=q_segments,
        kv_segment_ids=kv_segments,
        q_positions=q_positions,
        kv_positions=kv_positions,
        layout=layout,
    )
    if isinstance(head_chunks, bool) or not isinstance(head_chunks, Integral):
        raise ValueError(f"head_chunks is a number of groups, not {head_chunks!r}")
    scale, learned_scale = _scales(scale)
    static = dict(
        mesh=mesh,
        attention="auto" if attention is None else attention,
        scale=scale,
        head_chunks=int(head_chunks),
        return_logsumexp=bool(return_logsumexp),
    )
    if _is_pure(static["attention"]):
        run = partial(_compiled, **static)
    else:
        run = jax.jit(partial(_run, **static))
    with remedies_for(mesh):
        return run(q, k, v, mask, learned_scale, sinks)


def _run(q, k, v, mask, learned_scale, sinks, *, scale, **static):
    scale = scale if learned_scale is None else learned_scale
    return attend(q, k, v, mask=mask, scale=scale, sinks=sinks, **static)


# Of the module: where the caller has no jit, the second call finds the first's program.
_compiled = jax.jit(
    _run,
    static_argnames=("mesh", "attention", "scale", "head_chunks", "return_logsumexp"),
)


def _is_pure(attention: Any) -> bool:
    """Whether it computes today what it did when it was compiled.

    What a closure, a method or a module holds may be others' tracers, or new weights.
    """
    if isinstance(attention, Parts):
        return all(map(_is_pure, attention))
    if isinstance(attention, partial):
        held = (*attention.args, *attention.keywords.values())
        return _is_pure(attention.func) and all(map(_is_plain, held))
    if inspect.isfunction(attention):
        defaults = attention.__kwdefaults__ or {}
        held = (*(attention.__defaults__ or ()), *defaults.values())
        return attention.__closure__ is None and all(map(_is_plain, held))
    return isinstance(attention, str)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _scales(scale: Any) -> tuple[float | None, Array | None]:
    """A scale as (number, None) or as (None, array): part of the program, or given to
    it."""
    if scale is None:
        return None, None
    is_array = isinstance(scale, jax.Array)
    if not is_array and (isinstance(scale, Real) or isinstance(scale, np.ndarray)):
        scale = np.asarray(scale)
    shape, dtype = getattr(scale, "shape", None), getattr(scale, "dtype", np.void)
    kinds = jnp.floating, jnp.integer
    if shape != () or not any(jnp.issubdtype(dtype, kind) for kind in kinds):
        what = type(scale).__name__ if shape is None else f"{dtype}{list(shape)}"
        raise ValueError(
            f"scale is one number or a scalar array, not {what}: multiply q by what "
            "differs from head to head, and give scale=1.0"
        )
    if is_array:
        return None, scale
    if not math.isfinite(scale):
        raise ValueError(f"scale is a finite number, not {scale}")
    return float(scale), None


@contextmanager
def remedies_for(mesh: Mesh | AbstractMesh) -> Iterator[None]:
    """Says what to do where JAX only says what is wrong."""
    spec = activation("BTNH", dict(mesh.shape))
    lay_out = (
        f"lay q, k and v out first, jax.device_put(q, NamedSharding(mesh, {spec})), "
        f"segment_ids and positions with P({spec[0]!r}), a scale that is an array with "
        "P()"
    )
    remedies = {
        "incompatible devices": lay_out,
        "Disallowed": lay_out,
        "Closing over inputs to shard_map": (
            "the function given as attention closes over an array that lies on a mesh "
            "with Explicit axes: use a mesh with Auto axes, make_mesh's default, or "
            "close over a NumPy array, np.asarray(x) outside of jit"
        ),
        "forward-mode": (
            "ulysses_attention has derivatives in reverse mode alone: use jax.grad or "
            "jax.vjp; jax.jvp works on the gradient, jax.jvp(jax.grad(f), ...)"
        ),
    }
    try:
        yield
    except (ValueError, TypeError, NotImplementedError, JaxRuntimeError) as error:
        for said, remedy in remedies.items():
            if said in str(error):
                raise ValueError(f"{remedy} ({error})") from error
        raise


def mesh_for(mesh: Mesh | AbstractMesh | None, q: Array) -> Mesh | AbstractMesh:
    """The mesh that is given, as q may lie on it; None: the one that is set."""
    if not isinstance(mesh, Mesh | AbstractMesh | None):
        raise ValueError(
            "mesh is a jax.sharding.Mesh with an axis named seq, such as "
            f"make_mesh(seq=8), not {mesh!r}"
        )
    ambient = jax.sharding.get_abstract_mesh()
    if mesh is None:
        if ambient.empty:
            raise ValueError(
                "no mesh: pass mesh=make_mesh(...), or call jax.set_mesh(mesh) first"
            )
        return ambient
    if not ambient.empty:
        if dict(ambient.shape) != dict(mesh.shape):
            raise ValueError(
                f"mesh is {dict(mesh.shape)}, but jax.set_mesh has set "
                f"{dict(ambient.shape)}: pass that one, or leave mesh out"
            )
        return ambient  # it knows which axes an outer shard_map has made manual
    if isinstance(mesh, Mesh) and jax.typeof(q).sharding.mesh.empty:
        # Nothing around here knows of Explicit axes, and jax.grad outside of jit
        # refuses results that do.
        auto = (AxisType.Auto,) * len(mesh.axis_names)
        return Mesh(mesh.devices, mesh.axis_names, axis_types=auto)
    return mesh


def _pair(ids: Any, name: str, q: Array, k: Array) -> tuple[Any, Any]:
    """Splits one array of ids, or a pair of them, into the queries' and the keys'."""
    if ids is None:
        return None, None
    if isinstance(ids, tuple):
        if len(ids) != 2:
            raise ValueError(f"{name} is an array or a pair, not {len(ids)} of them")
        q_ids, kv_ids = ids
    else:
        if q.shape[1] != k.shape[1]:
            raise ValueError(
                f"{q.shape[1]} query tokens but {k.shape[1]} key tokens: give {name} "
                "as a pair, [B, T] for the queries and [B, S] for the keys"
            )
        q_ids = kv_ids = ids
    shapes = q.shape[:2], k.shape[:2]
    q_ids, kv_ids = (
        int32_ids(each, name, shape)
        for each, shape in zip((q_ids, kv_ids), shapes, strict=True)
    )
    return q_ids, kv_ids
