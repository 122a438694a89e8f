"""One member's queries against the keys of each member in turn: which of them meet."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

KeysAndValues = Float[Array, "2 B s K H"]
Statistics = tuple[Float[Array, "B t N H"], Float[Array, "2 B N t"]]
Gradients = tuple[Float[Array, "B t N H"], Float[Array, "2 B s K H"]]


@dataclass(frozen=True)
class Blocks:
    """The members of a mesh axis, each with a block of the tokens; inside `shard_map`.

    Where the mask goes by index, every pair of blocks is full, causal by local indices
    or empty, so that attentions which know no positions can do it: a member's own block
    is causal; of another's, in the sequence's own order all keys are seen if it comes
    earlier, and none if later. In zigzag order a member has half-blocks r and 2R-1-r:
    all its queries see the first half of an earlier member, and its second half sees
    all of a later one. Both are as much work, and nothing hidden is computed.

    Where a mask has positions, the attention compares them.

    Attributes:
      parts: the local attention taken apart: `statistics`, `gradients`, `join`, and
        `with_sinks` of what is joined, `sinks_gradient`.
      scale: handed to it.
      axis_name: of the members.
      zigzag: whether the tokens are in zigzag order over them.
      with_logsumexp: the logsumexp is a result as well, and has a gradient.
    """

    parts: Any
    scale: float | None
    axis_name: str
    zigzag: bool
    with_logsumexp: bool = False

    @property
    def degree(self) -> int:
        return lax.axis_size(self.axis_name)

    def member(self, q: Array) -> Array:
        """The number of this member.

        Tied to q: else JAX hoists what depends on it alone out of a scan over layers,
        into a shard_map without operands, which XLA refuses (jax 0.10.2: "expected at
        least one operand ... to be produced by a GlobalToLocalShape").
        """
        index, _ = lax.optimization_barrier((lax.axis_index(self.axis_name), q[:1, :1]))
        return index

    def source(self, q: Array, step: Array | int) -> Array:
        """The member whose keys member i attends to in a step: i - step."""
        return (self.member(q) - step) % self.degree

    def own(self, q: Array, kv: KeysAndValues, mask: Any) -> Statistics:
        """Float32 out and logsumexp over the keys of the same member.

        The logsumexp is two arrays that add up to it.
        """
        return self._forward(q, kv, mask, 0, _ALL, _ALL, mask.causal)

    def add(
        self, so_far: Statistics, q: Array, kv: KeysAndValues, mask: Any, step: Any
    ) -> Statistics:
        """Joins another member's keys to what was attended to so far."""

        def case(rows, keys):
            def joined_to(so_far):
                out, logsumexp = so_far
                new = self._forward(q, kv, mask, step, rows, keys, self._causal(mask))
                old = out[:, rows], logsumexp[..., rows]
                joined_out, joined = self.parts.join(old, new)
                return (
                    out.at[:, rows].set(joined_out),
                    logsumexp.at[..., rows].set(joined),
                )

            return joined_to

        return self._choose(q, kv, mask, step, case, lambda so_far: so_far, so_far)

    def own_gradients(
        self, q: Array, kv: KeysAndValues, mask: Any, whole: tuple[Array, ...]
    ) -> Gradients:
        """Float32 dq and (dk, dv) of the same member's keys.

        Args:
          whole: out, logsumexp and dout over all keys, and dlogsumexp
            `with_logsumexp`.
        """
        return self._gradients(q, kv, mask, 0, _ALL, _ALL, mask.causal, whole)

    def gradients(
        self,
        q: Array,
        kv: KeysAndValues,
        mask: Any,
        step: Any,
        whole: tuple[Array, ...],
    ) -> Gradients:
        """Float32 dq and (dk, dv) of another member's keys."""
        zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, kv))

        def case(rows, keys):
            def pull_back(zeros):
                zero_q, zero_kv = zeros
                dq, dkv = self._gradients(
                    q, kv, mask, step, rows, keys, self._causal(mask), whole
                )
                return zero_q.at[:, rows].set(dq), zero_kv.at[:, :, keys].set(dkv)

            return pull_back

        return self._choose(q, kv, mask, step, case, lambda zeros: zeros, zeros)

    def _choose(self, q, kv, mask, step, case: Callable, nothing: Callable, operand):
        """Runs the case of (queries, keys) that meet; they are slices of tokens."""
        if not mask.causal or mask.q_positions is not None:
            return case(_ALL, _ALL)(operand)
        earlier, later = case(_ALL, _ALL), nothing
        if self.zigzag:
            first = slice(0, kv.shape[2] // 2)
            second = slice(q.shape[1] // 2, q.shape[1])
            earlier, later = case(_ALL, first), case(second, _ALL)
        is_earlier = self.source(q, step) < self.member(q)
        return lax.cond(is_earlier, earlier, later, operand)

    def _causal(self, mask: Any) -> bool:
        """Whether tokens of two members that meet are compared one by one."""
        return mask.causal and mask.q_positions is not None

    def _forward(self, q, kv, mask, step, rows, keys, causal) -> Statistics:
        between = self._between(q, kv, mask, step, rows, keys, causal)
        k, v = kv[:, :, keys]
        return self.parts.statistics(q[:, rows], k, v, mask=between, scale=self.scale)

    def _gradients(self, q, kv, mask, step, rows, keys, causal, whole) -> Gradients:
        between = self._between(q, kv, mask, step, rows, keys, causal)
        k, v = kv[:, :, keys]
        out, logsumexp, dout, *dlogsumexp = whole
        pull = self.parts.gradients
        if self.with_logsumexp:
            pull = self.parts.gradients_of_both
        dq, dk, dv = pull(
            q[:, rows],
            k,
            v,
            out[:, rows],
            logsumexp[..., rows],
            dout[:, rows],
            *(each[..., rows] for each in dlogsumexp),
            mask=between,
            scale=self.scale,
        )
        return dq.astype(jnp.float32), jnp.stack((dk, dv)).astype(jnp.float32)

    def _between(self, q, kv, mask, step, rows, keys, causal) -> Any:
        """The mask, of whole rows of tokens, between those that meet."""
        first, num_q = _extent(rows, q.shape[1])
        first_key, num_kv = _extent(keys, kv.shape[2])
        return mask.between(
            self.member(q) * q.shape[1] + first,
            num_q,
            self.source(q, step) * kv.shape[2] + first_key,
            num_kv,
            causal=causal,
        )


_ALL = slice(None)


def _extent(tokens: slice, size: int) -> tuple[int, int]:
    start, stop, _ = tokens.indices(size)
    return start, stop - start
