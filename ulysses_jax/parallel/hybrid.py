"""Ulysses inside the members of a ring; where seq is 1, ring attention alone."""

from functools import partial
from typing import Any

from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float

from ulysses_jax.parallel.ring import ring_attention
from ulysses_jax.parallel.ulysses import ulysses


def hybrid(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mesh: Mesh | AbstractMesh,
    mask: Any,
    scale: float | None = None,
    parts: Any,
    zigzag: bool = False,
    seen_steps: tuple[int, ...] | None = None,
    head_chunks: int = 1,
    with_logsumexp: bool = False,
    sinks: Float[Array, "N"] | None = None,
    by_head: bool = False,
) -> Array | tuple[Array, Array]:
    """Ulysses over `seq` inside a member of the ring, ring attention over `ring`.

    Where seq is 1 nothing is exchanged: ring alone. Any number of heads works, as
    Ulysses pads and repeats them.

    Args: as `parallel.ulysses.ulysses` and `parallel.ring.ring_attention`.
    """
    attention = partial(
        ring_attention,
        parts=parts,
        zigzag=zigzag,
        seen_steps=seen_steps,
        with_logsumexp=with_logsumexp,
    )
    return ulysses(
        q,
        k,
        v,
        mesh=mesh,
        attention=attention,
        mask=mask,
        scale=scale,
        head_chunks=head_chunks,
        with_logsumexp=with_logsumexp,
        sinks=sinks,
        by_head=by_head,
    )
