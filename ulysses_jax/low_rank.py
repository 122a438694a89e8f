"""Dynamic low-rank attention, for any encoder: keys are mixed into a few first."""

from dataclasses import dataclass
from functools import partial

from jax import lax
from jaxtyping import Array, Float

from ulysses_jax.attention.low_rank import low_rank
from ulysses_jax.linear import check_array, check_groups, checked_scale
from ulysses_jax.parallel.states import AxisNames
from ulysses_jax.recur import AnyMesh, Arrays, SegmentIds, recur


@dataclass(frozen=True)
class LowRank:
    """Of projection, k, v, q."""

    name = "low_rank_attention"
    scale: float

    def __call__(self, arrays: Arrays, ids: SegmentIds, over: AxisNames) -> Array:
        del ids
        projection, k, v, q = arrays
        sum_over = partial(lax.psum, axis_name=over) if over else lambda x: x
        max_over = partial(lax.pmax, axis_name=over) if over else lambda x: x
        reduce = dict(sum_over=sum_over, max_over=max_over)
        return low_rank(q, k, v, projection, scale=self.scale, **reduce)


def low_rank_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K V"],
    *,
    projection: Float[Array, "B T K R"],
    mesh: AnyMesh | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Array, "B T N V"]:
    """Attention to R mixtures of all keys, over a sequence spread over `ring`, `seq`.

    `p = softmax of projection over the tokens`, `k' = p^T k`, `v' = p^T v` (R of each),
    `out = softmax(scale q k'^T) v'`. With R = T and a `projection` whose softmax picks
    a token each it is attention itself.

    Args:
      q: global, float32, bfloat16 or float16, B over (data, fsdp), T over (ring, seq),
        heads over tensor.
      k, v: likewise; each of their K heads serves N/K of q. V may differ from H, and H
        be small: that is the other half of the paper's saving.
      projection: likewise, float: R logits a token and head of k. A dense layer of what
        the keys are made of gives them.
      mesh: as in `ulysses_attention`; an empty one is one device.
      causal: there is no such form: a mixture has tokens of everywhere.
      scale: None: H**-0.5.

    Returns:
      `[B, T, N, V]`, q's dtype, lying as q. Sums and softmax are float32.

    Raises:
      ValueError: causal=True; dims that do not fit each other or the mesh; a call
        inside a `shard_map` over ring or seq.

    Cost: 2 R (H + V) FLOPs a token and head of k, and as many a head of q, forward.
    Over the shards one sum of B K R (H + V + 1) and one maximum of B K R float32
    numbers (B and K: what a device has), whatever T is, and one more such sum backward.

    Source: DBA, arXiv 2211.16368, in outline: its abstract and the form of its public
    descriptions. There the projection is made by the layer, from learned queries, and
    H is compressed by learned matrices; here the caller gives both.
    """
    arrays = {"q": q, "k": k, "v": v, "projection": projection}
    for name, x in arrays.items():
        check_array(name, x, "[B, T, heads, size]")
    shapes = ", ".join(f"{name} {x.shape}" for name, x in arrays.items())
    tokens_and_heads = {x.shape[:3] for x in (k, v, projection)}
    if len(tokens_and_heads) > 1 or (q.shape[:2], q.shape[3]) != (
        k.shape[:2],
        k.shape[3],
    ):
        raise ValueError(
            "q is [B, T, N, H], k [B, T, K, H], v [B, T, K, V] and projection "
            f"[B, T, K, R]; got {shapes}"
        )
    check_groups("k", k.shape[2], "q", q.shape[2])
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, k and v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}: cast them"
        )
    if causal:
        raise ValueError(
            "low_rank_attention is not causal: a mixture of keys has tokens of all "
            "places. Give causal=False in an encoder; a causal model takes "
            "ulysses_attention or linear_attention"
        )
    return recur(
        LowRank(checked_scale(q, scale)),
        (projection, k, v, q),
        ("BTNH",) * 4,
        mesh=mesh,
        segment_ids=None,
    )
