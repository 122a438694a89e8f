"""Linear attention, the gated delta rule and short convolutions, for any model."""

import math
from numbers import Integral, Real
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ulysses_jax.attention import delta, linear
from ulysses_jax.parallel.spread import DTYPES
from ulysses_jax.recur import AnyMesh, Convolution, Delta, Linear, SegmentIds, recur

Decay = float | np.ndarray | Float[Array, "N"] | None


def linear_attention(
    q: Float[Array, "B T K H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T N V"],
    *,
    mesh: AnyMesh | None = None,
    decay: Decay = None,
    log_decay: Float[Array, "B T N"] | None = None,
    causal: bool = True,
    segment_ids: SegmentIds = None,
    scale: float | None = None,
    chunk_tokens: int | None = None,
) -> Float[Array, "B T N V"]:
    """Linear attention with decay, over a sequence spread over `ring` and `seq`.

    `S_t = a_t S_(t-1) + k_t v_t^T`, `o_t = scale S_t^T q_t`, S float32 `[H, V]` a head.

    Args:
      q, k: global, float32, bfloat16 or float16, B over (data, fsdp), T over (ring,
        seq), heads over tensor. Head n of v reads head n // (N/K) of q and k.
      v: likewise, q's dtype; it has a state a head. Tokens are in their own order.
      mesh: as in `ulysses_attention`; an empty one is one device.
      decay: a, in (0, 1], a number or one a head, which may be traced or learned.
      log_decay: instead of it the logarithm of a_t of every token and head, finite and
        at most 0. Neither: a is 1. Above 0, or beyond what `beta` may be, the output
        is NaN, infinite or far off: refused only where values are known, which they
        are not inside of `jax.jit` and `jax.grad`.
      causal: there is no other form.
      segment_ids: integers, global; where they change along a row a document begins,
        which finds a state of 0. None: all is one.
      scale: None: H**-0.5.
      chunk_tokens: C, of a chunk, which is computed as products of matrices; the
        backward pass keeps about 2 sqrt(T / C) states. None: 128.

    Returns:
      `[B, T, N, V]`, q's dtype, lying as v.

    Raises:
      ValueError: dims that do not fit each other or the mesh; a decay outside (0, 1],
        or a log_decay above 0, where values are known; causal=False; a call inside a
        `shard_map` over ring or seq; an argument that is not what is said here.

    Cost: 2 C (H + V) + 4 H V FLOPs a token and head forward, and for the backward pass
    about 2 sqrt(chunks) float32 states of H V numbers a head. Over P shards
    1 + ceil(log2(P - 1)) hops of 4 B N H V bytes forward (B and N: what a device has)
    and as many backward, whatever T is: `parallel.bytes.state_bytes`; and 2 H V FLOPs
    more a token, to read the state that came.

    Source: Lightning attention, arXiv 2401.04658; decays by token as in Mamba-2, arXiv
    2405.21060; states over shards as in LASP-2, arXiv 2502.07563, which gathers all of
    them where here they are joined on the way.
    """
    name = linear.NAME
    _check(name, q, k, v, causal)
    rule = Linear(*_numbers(q, scale, chunk_tokens, linear.CHUNK_TOKENS))
    log_decay, dims = _log_decay(decay, log_decay, v)
    arrays, letters = (q, k, v, log_decay), ("BTNH", "BTNH", "BTNH", dims)
    return recur(rule, arrays, letters, mesh=mesh, segment_ids=segment_ids)


def gated_delta_rule(
    q: Float[Array, "B T K H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T N V"],
    *,
    beta: Float[Array, "B T N"],
    mesh: AnyMesh | None = None,
    decay: Decay = None,
    log_decay: Float[Array, "B T N"] | None = None,
    causal: bool = True,
    segment_ids: SegmentIds = None,
    scale: float | None = None,
    unit_lengths: bool = True,
    chunk_tokens: int | None = None,
) -> Float[Array, "B T N V"]:
    """The gated delta rule, over a sequence spread over `ring` and `seq`.

    `S_t = a_t (I - b_t k_t k_t^T) S_(t-1) + b_t k_t v_t^T`, `o_t = scale S_t^T q_t`.

    Args:
      beta: b_t, of every token and head, how much of what the state has for the key is
        replaced: 0 to 1. To 2 it may reflect it; beyond, states grow without bounds: it
        is refused where values are known, and `unit_lengths`.
      unit_lengths: q and k are divided by their lengths a head, in float32. Without it
        states grow wherever b_t |k_t|^2 is above 2.
      chunk_tokens: None: 64.
      The others: as in `linear_attention`.

    Returns, raises: as `linear_attention`.

    Cost: 4 C (H + V) + 2/3 C^2 + 6 H V FLOPs a token and head forward; where T is
    spread, V + H in the place of V. All hops but the last two are of 4 B N H (H + V)
    bytes.

    Source: Gated Delta Networks, arXiv 2412.06464.
    """
    name = delta.NAME
    _check(name, q, k, v, causal)
    _check_per_token("beta", beta, v)
    most = 2.0 if unit_lengths else float(np.finfo(np.float32).max)
    bounds = "0 to 2" if unit_lengths else "finite and not below 0"
    why = f"{bounds}: beyond, states grow without bounds; sigmoid(x) is 0 to 1"
    _check_values("beta", beta, 0.0, most, why)
    numbers = _numbers(q, scale, chunk_tokens, delta.CHUNK_TOKENS)
    rule = Delta(*numbers, unit_lengths=bool(unit_lengths))
    log_decay, dims = _log_decay(decay, log_decay, v)
    arrays, letters = (q, k, v, log_decay), ("BTNH", "BTNH", "BTNH", dims)
    arrays, letters = (*arrays, beta), (*letters, "BTN")
    return recur(rule, arrays, letters, mesh=mesh, segment_ids=segment_ids)


def short_convolution(
    x: Float[Array, "B T N H"],
    weights: Float[Array, "W N H"],
    *,
    mesh: AnyMesh | None = None,
    segment_ids: SegmentIds = None,
) -> Float[Array, "B T N H"]:
    """A causal convolution of every feature by itself, inside documents.

    `out_t = sum over d < W of weights[W-1-d] x_(t-d)`, where t - d is of t's document.

    Args:
      x: global, B over (data, fsdp), T over (ring, seq), N over tensor.
      weights: of W tokens, the last of which are the token's own; float.
      mesh, segment_ids: as in `linear_attention`.

    Returns:
      As x, lying as x; sums are float32.

    Raises:
      ValueError: a shard of fewer than W - 1 tokens; what `linear_attention` refuses.

    Cost: every shard sends its last W - 1 tokens to the next.
    """
    check_array("x", x, "[B, T, N, H]")
    shape = getattr(weights, "shape", (0,))
    if shape[1:] != x.shape[2:] or 0 in shape:
        raise ValueError(
            f"weights have shape {shape} and x {x.shape}: give [W, N, H] for x's "
            "[B, T, N, H]"
        )
    return recur(
        Convolution(),
        (x, weights),
        ("BTNH", "WNH"),
        mesh=mesh,
        segment_ids=segment_ids,
        tokens_before=len(weights) - 1,
    )


def _check(name: str, q: Any, k: Any, v: Any, causal: bool) -> None:
    for what, x in (("q", q), ("k", k), ("v", v)):
        check_array(what, x, "[B, T, heads, size]")
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if q.shape != k.shape or q.shape[:2] != v.shape[:2]:
        raise ValueError(
            f"q and k are [B, T, K, H] and v is [B, T, N, V]; got {shapes}"
        )
    check_groups("q and k", q.shape[2], "v", v.shape[2])
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, k and v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}: cast them"
        )
    if not causal:
        raise ValueError(
            f"{name} is causal: a state has what came before. For tokens that see what "
            "comes after them too use ulysses_attention(..., causal=False)"
        )


def check_groups(shared: str, num_shared: int, each: str, num_heads: int) -> None:
    """Refuses heads of which each does not serve the same number of others."""
    if num_heads % num_shared:
        fits = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
        more = -(-num_heads // num_shared) * num_shared
        raise ValueError(
            f"the {num_shared} heads of {shared} do not divide the {num_heads} of "
            f"{each}, and each serves the same number of these: give {shared} one of "
            f"{fits} heads, or {each} {more}"
        )


def check_array(name: str, x: Any, dims: str) -> None:
    """Refuses what is no array of four dims, of a dtype that attention takes."""
    if getattr(x, "ndim", None) != 4 or 0 in x.shape:
        what = getattr(x, "shape", type(x).__name__)
        raise ValueError(f"{name} is an array {dims} with no dim of 0, not {what}")
    if x.dtype not in DTYPES:
        raise ValueError(
            f"{name} is float32, bfloat16 or float16, and states are float32, not "
            f"{x.dtype}: cast it, and what comes back"
        )


def _check_per_token(name: str, x: Any, v: Array) -> None:
    shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", np.void)
    if shape != v.shape[:3] or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"{name} is a float for every token and head of v, {v.shape[:3]}, not "
            f"{type(x).__name__ if shape is None else f'{dtype} {shape}'}"
        )


def _numbers(
    q: Array, scale: Any, chunk_tokens: Any, default: int
) -> tuple[float, int]:
    if chunk_tokens is not None and (
        isinstance(chunk_tokens, bool)
        or not isinstance(chunk_tokens, Integral)
        or chunk_tokens < 1
    ):
        raise ValueError(
            f"chunk_tokens is a number of tokens, 1 or more, not {chunk_tokens!r}: "
            f"leave it out for {default}"
        )
    return checked_scale(q, scale), int(chunk_tokens or default)


def checked_scale(q: Array, scale: Any) -> float:
    """H**-0.5 for None; ValueError where it is not one finite number."""
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, Real)):
        raise ValueError(
            f"scale is one number, not {scale!r}: multiply q by what is learned, and "
            "give scale=1.0"
        )
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale is a finite number, not {scale}")
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


def _log_decay(decay: Any, log_decay: Any, v: Array) -> tuple[Array, str]:
    """`[N]` or `[B, T, N]`, float, and its letters; checked where values are known.

    Raises:
      ValueError: both are given; another shape; a decay outside (0, 1].
    """
    if log_decay is not None:
        if decay is not None:
            raise ValueError(
                "decay and log_decay are both given: add log(decay) to log_decay, and "
                "leave decay out"
            )
        _check_per_token("log_decay", log_decay, v)
        _check_values(
            "log_decay",
            log_decay,
            float(np.finfo(np.float32).min),
            0.0,
            "finite and at most 0: above it states grow without bounds; for a decay a "
            "in (0, 1] give log(a), for a rate r -r, and for documents segment_ids",
        )
        return log_decay, "BTN"
    heads = v.shape[2]
    decay = 1.0 if decay is None else decay
    decay = decay if isinstance(decay, jax.Array) else np.asarray(decay)
    is_number = any(jnp.issubdtype(decay.dtype, x) for x in (jnp.floating, jnp.integer))
    if decay.shape not in ((), (heads,)) or not is_number:
        raise ValueError(
            f"decay is a number, or one for each of the {heads} heads of v, not "
            f"{decay.dtype} {decay.shape}: what differs by token is log_decay"
        )
    _check_values(
        "decay",
        decay,
        float(np.finfo(np.float32).tiny),
        1.0,
        "in (0, 1], in float32 from 1.2e-38 on: above 1 states grow without bounds, at "
        "0 a token finds none; for a rate r give exp(-r), and for documents "
        "segment_ids",
    )
    decay = jnp.log(jnp.asarray(decay, jnp.float32))
    return jnp.broadcast_to(decay, (heads,)), "N"


def _check_values(name: str, x: Any, least: float, most: float, must_be: str) -> None:
    """Refuses values out of bounds, and NaN, where they are known: not while tracing,
    and not where other processes have a part of them."""
    if isinstance(x, jax.core.Tracer) or not getattr(x, "is_fully_addressable", True):
        return
    if isinstance(x, jax.Array):
        with jax.ensure_compile_time_eval():  # of a known value inside a jit, too
            low, high = map(float, jax.device_get((jnp.min(x), jnp.max(x))))
    else:  # where the mesh is of devices that are described, none can compute
        x = np.asarray(x, np.float32)
        low, high = float(x.min()), float(x.max())
    if not (least <= low and high <= most):
        is_one = low == high or low != low  # NaN
        found = f"{low:g}" if is_one else f"{low:g} to {high:g}"
        raise ValueError(f"{name} is {found}, and must be {must_be}")
