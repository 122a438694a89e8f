"""The one function for people with a model of their own, and its Flax form."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh
from jaxtyping import Array, Float, Int

from ulysses_jax.attend import attend
from ulysses_jax.attention.mask import Mask
from ulysses_jax.attention.parts import Parts
from ulysses_jax.parallel.ulysses import LocalAttention

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
    scale: float | None = None,
    head_chunks: int = 1,
) -> Float[Array, "B T N H"]:
    """Attends over a sequence that is spread over the mesh axes `ring` and `seq`.

    `[B, T/P, N, H] -> all-to-all -> [B, T, N/P, H] -> attention -> all-to-all back`.
    Over a ring of degree R, P devices hold T/R tokens each, and blocks of keys go round
    (ring attention). Works under jit, grad, checkpoint and scan, on meshes with
    Explicit or Auto axes.

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
        (`ulysses_jax.attention.select.local_attention` says which). Over a ring, a
        `ulysses_jax.attention.parts.Parts`: an attention to some keys at a time.
      causal: a query sees keys at its own position and before. Where T != S, both count
        from 0.
      window: a query sees keys fewer than this many positions away.
      segment_ids: integers, global `[B, T]` (or a pair, `[B, T]` and `[B, S]`): tokens
        see only tokens of their own segment.
      positions: integers, global, shaped likewise: what `causal` and `window` compare.
        None: 0, 1, 2, ...
      scale: of the logits; None: H**-0.5.
      head_chunks: exchange and attend the local heads in this many groups, one group's
        exchange free to run under another's attention.

    Returns:
      `[B, T, N, H]`, q's dtype, B over (data, fsdp), T over (ring, seq), N over
      tensor. A query that sees no key gives 0.

    Raises:
      ValueError: dims that do not fit each other or the mesh, with the numbers and what
        would fit.

    Cost: with e bytes an element and g = N/K, each device receives
    (2 + 2/g) (T D / P) (P-1)/P e bytes a row of the batch forward for D = N H and
    P <= K, in four all-to-alls, and as much backward. Where P > K each KV head is
    repeated P/K times, so k and v cost as if K were P. Where the heads do not divide
    over P, query heads are padded to the next number of slots that does
    (`parallel.exchange.head_layout`): exchange and attention then cost slots / N times
    as much, e.g. 8/6 for 6 heads over 4 devices. `spreading.received_bytes` has the
    formulas, those of a ring too. Under a causal mask the members of a ring work
    unequally: the last one has all the work there is, 2 - 1/R times the mean.

    Source: DeepSpeed-Ulysses, arXiv 2309.14509; repeated KV heads as in ALST,
    arXiv 2506.13996; ring attention, arXiv 2310.01889.
    """
    mesh = _mesh(mesh, q)
    q_segments, kv_segments = _pair(segment_ids, "segment_ids", q, k)
    q_positions, kv_positions = _pair(positions, "positions", q, k)
    mask = Mask(
        causal=causal,
        window=window,
        q_segment_ids=q_segments,
        kv_segment_ids=kv_segments,
        q_positions=q_positions,
        kv_positions=kv_positions,
    )
    return attend(
        q,
        k,
        v,
        mesh=mesh,
        mask=mask,
        attention="auto" if attention is None else attention,
        scale=scale,
        head_chunks=head_chunks,
    )


def attention_fn(
    mesh: Mesh | AbstractMesh | None = None,
    *,
    attention: LocalAttention | Parts | None = None,
    causal: bool = False,
    window: int | None = None,
    segment_ids: PerToken | None = None,
    scale: float | None = None,
    head_chunks: int = 1,
) -> Callable[..., Array]:
    """Makes an `attention_fn` for `flax.nnx.MultiHeadAttention`.

    Args: as `ulysses_attention`'s; attention is causal when `causal` or the call's
      `is_causal` says so.

    Returns:
      A function with the signature that `flax.nnx.MultiHeadAttention` calls.

    Raises (when called):
      ValueError: for what the exchange cannot honour: `bias`, a dense `mask` (use
        causal, window or segment_ids), dropout of attention weights, sowing them
        through `module`, and `precision`.
    """

    def fn(
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None = None,
        mask: Array | None = None,
        *,
        broadcast_dropout: bool = True,
        dropout_rng: Any = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        is_causal: bool = False,
    ) -> Array:
        del broadcast_dropout, dropout_rng  # they matter only where dropout does
        refused = {
            "bias": (bias is not None, "leave it out"),
            "mask": (
                mask is not None,
                "a dense [T, S] mask does not exist at these lengths: give attention_fn"
                "(causal=..., window=..., segment_ids=...) or is_causal=True",
            ),
            "dropout": (
                dropout_rate > 0 and not deterministic,
                "attention weights are never whole on a device: set dropout_rate=0 or "
                "deterministic=True",
            ),
            "module": (
                module is not None,
                "attention weights are never whole on a device: set sow_weights=False",
            ),
            "precision": (
                precision is not None,
                "give attention_fn(attention=...) a function that sets it",
            ),
        }
        for name, (present, remedy) in refused.items():
            if present:
                raise ValueError(f"attention_fn cannot honour {name}: {remedy}")
        if dtype is None:
            dtype = jnp.result_type(query, key, value)
        return ulysses_attention(
            query.astype(dtype),
            key.astype(dtype),
            value.astype(dtype),
            mesh=mesh,
            attention=attention,
            causal=causal or is_causal,
            window=window,
            segment_ids=segment_ids,
            scale=scale,
            head_chunks=head_chunks,
        )

    return fn


def _mesh(mesh: Mesh | AbstractMesh | None, q: Array) -> Mesh | AbstractMesh:
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
    return _int32(q_ids, name, q), _int32(kv_ids, name, k)


def _int32(ids: Any, name: str, like: Array) -> Array:
    """The ids in the one dtype in which their differences are right: not unsigned."""
    if not isinstance(ids, jax.Array):
        ids = np.asarray(ids)
        limits = np.iinfo(np.int32)
        if ids.size and (ids.min() < limits.min or ids.max() > limits.max):
            raise ValueError(f"{name} {ids.min()} to {ids.max()} exceed int32")
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"{name} are integers, not {ids.dtype}")
    if ids.shape != like.shape[:2]:
        raise ValueError(
            f"{name} has shape {ids.shape}, but there are {like.shape[:2]} (batch, "
            "tokens)"
        )
    return jnp.asarray(ids, jnp.int32)
