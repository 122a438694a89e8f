"""What a device receives under each strategy, by formula."""

from ulysses_jax.parallel.states import hops
from ulysses_jax.parallel.zigzag import seen_steps
from ulysses_jax.strategies import Strategy, check_name


def received_bytes(
    strategy: Strategy,
    *,
    tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    itemsize: int,
    ring: int,
    seq: int,
    width: int | None = None,
    window: int | None = None,
    zigzag: bool = True,
) -> dict[tuple[str, str], tuple[float, float]]:
    """Bytes that a device receives a layer and row of the batch: the formulas.

    Args:
      tokens: T, global.
      num_heads, num_kv_heads: of one device's part of `tensor`.
      itemsize: e, of the compute dtype.
      ring, seq: the degrees.
      width: D; only megatron sends whole activations, the others heads.
      window, zigzag: of a causal mask and of the order of tokens: what a ring sends.

    Returns:
      By (collective, axis): (forward, backward). With P = ring x seq, S = seq, R =
      ring, K' = K or, where S > K, each KV head repeated to S in all, never beyond N:
      the exchange, `2 (N + K') H (T/P) (S-1)/S e` both ways; a ring's n blocks (R - 1,
      or the `seen_steps` of a window), `2 (K'/S) H (T/R) n e` forward, and
      `2 (K'/S) H (T/R) ((n-1) e + n 4)` backward, with float32 gradients; the gather
      `2 K H T (S-1)/S e` forward, and its float32 gradients backward; megatron's two
      gathers and two scatters of D features, for attention and feed-forward,
      `4 T D (S-1)/S e` both ways.
    """
    check_name(strategy)
    found: dict[tuple[str, str], tuple[float, float]] = {}
    if strategy == "megatron":
        if width is None:
            raise ValueError("megatron sends whole activations: give their width")
        two = 2 * tokens * width * (seq - 1) / seq * itemsize
        return {(k, "seq"): (two, two) for k in ("all-gather", "reduce-scatter")}
    if strategy == "all_gather":
        elements = 2 * num_kv_heads * head_size * tokens * (seq - 1) / seq
        found["all-gather", "seq"] = (elements * itemsize, 0.0)
        found["reduce-scatter", "seq"] = (0.0, elements * 4)
        return found
    kv_slots = min(max(num_kv_heads, seq), num_heads)
    if strategy in ("ulysses", "hybrid"):
        slots = 2 * (num_heads + kv_slots) * head_size
        exchange = slots * tokens / (ring * seq) * (seq - 1) / seq * itemsize
        found["all-to-all", "seq"] = (exchange, exchange)
    if strategy in ("ring", "hybrid"):
        block = 2 * kv_slots / seq * head_size * tokens / ring
        hops = len(
            seen_steps(tokens, tokens, ring, causal=True, window=window, zigzag=zigzag)
        )
        backward = block * (max(hops - 1, 0) * itemsize + hops * 4)
        found["collective-permute", "ring"] = (block * hops * itemsize, backward)
    return found


def state_bytes(
    *, shards: int, num_heads: int, state_size: int, change_size: int
) -> dict[int, float]:
    """Bytes that a device receives where states are handed on, a layer and row.

    Args:
      shards: P, over which the tokens lie: ring x seq.
      num_heads: of one device's part of `tensor`.
      state_size: numbers of a head's state, H V.
      change_size: of what its tokens do to a state: 1 of linear attention with decay,
        H^2 of the delta rule.

    Returns:
      By how many shards away they come from, forward, and as many backward: of the n
      `hops` float32 states, and of all but two the change too, together `4 N (n
      state_size + max(n - 2, 0) change_size)`, whatever the number of tokens is.
      Documents add one int32 forward.
    """
    found: dict[int, float] = {}
    for reach, with_change in hops(shards):
        sent = 4.0 * num_heads * (state_size + with_change * change_size)
        found[reach] = found.get(reach, 0.0) + sent
    return found


def convolution_bytes(
    *, convolution_tokens: int, features: int, itemsize: int
) -> float:
    """Bytes that a device receives for a short convolution, a layer and row.

    Args:
      convolution_tokens: W.
      features: N H, of one device's part of `tensor`.
      itemsize: e, of the dtype of what is convolved.

    Returns:
      From the shard before `(W - 1) N H e` forward, and as many backward. Documents add
      W - 1 int32 forward.
    """
    return float((convolution_tokens - 1) * features * itemsize)


def low_rank_bytes(
    *, shards: int, num_kv_heads: int, rank: int, mixture_size: int
) -> dict[str, float]:
    """Bytes that a device receives for `low_rank_attention`, a layer and row.

    Args:
      shards: P, over which the tokens lie: ring x seq.
      num_kv_heads: of one device's part of `tensor`.
      rank: R.
      mixture_size: numbers of one: H + V, and its weight, 1.

    Returns:
      An all-reduce's `2 (P-1)/P` of `4 K R` bytes: `forward` mixture_size + 1 of them,
      the maximum being the one; `backward` mixture_size.
    """
    of_one = 2 * (shards - 1) / shards * 4.0 * num_kv_heads * rank
    return {"forward": of_one * (mixture_size + 1), "backward": of_one * mixture_size}


def total_bytes(received: dict[tuple[str, str], tuple[float, float]]) -> float:
    """Forward and backward together, over all collectives."""
    return sum(forward + backward for forward, backward in received.values())
