"""An attention over some keys at a time: parts joined exactly, and pulled back so."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from ulysses_jax.attention.by_layout import gradients_by_layout, statistics_by_layout
from ulysses_jax.attention.join import Statistics, join
from ulysses_jax.attention.mask import Mask


class Parts(NamedTuple):
    """A flash attention taken apart.

    forward: `f(q, k, v, mask=, scale=) -> (out, logsumexp)`, out in q's dtype,
      logsumexp float32 `[B, N, T]`, over the keys that it is given; or `[2, B, N, T]`,
      two that add up to it, which loses no digits where logits are large.
    gradients: `f(q, k, v, out, logsumexp, dout, mask=, scale=) -> (dq, dk, dv)`. Given
      the out and logsumexp of a query over *all* its keys, it returns these keys' part
      of dq, and their dk and dv, to be summed over parts in float32.
    join: `f((out, logsumexp), (out, logsumexp)) -> (out, logsumexp)` of two sets of
      keys, in float32, each logsumexp as two that add up to it.
    """

    forward: Callable[..., tuple[Array, Array]]
    gradients: Callable[..., tuple[Array, Array, Array]]
    join: Callable[..., tuple[Array, Array]] = join

    def statistics(self, q, k, v, *, mask: Mask, scale: float | None) -> Statistics:
        """Float32, as `join` takes them."""
        out, logsumexp = self.forward(q, k, v, mask=mask, scale=scale)
        if logsumexp.ndim == 3:
            logsumexp = jnp.stack((logsumexp, jnp.zeros_like(logsumexp)))
        return out.astype(jnp.float32), logsumexp

    def by_layout(self) -> "Parts":
        """These, called on the tiles of a mask's layout, of which they need not know.

        This library's own do so themselves.
        """

        def forward(q, k, v, *, mask: Mask, scale: float | None):
            def of_tiles(q, k, v, mask):
                return self.statistics(q, k, v, mask=mask, scale=scale)

            return statistics_by_layout(of_tiles, q, k, v, mask)

        def gradients(q, k, v, out, logsumexp, dout, *, mask: Mask, scale=None):
            def of_tiles(q, k, v, out, dout, rows, mask):
                return self.gradients(q, k, v, out, *rows, dout, mask=mask, scale=scale)

            return gradients_by_layout(of_tiles, q, k, v, out, dout, (logsumexp,), mask)

        return self._replace(forward=forward, gradients=gradients)

    def gradients_of_both(
        self, q, k, v, out, logsumexp, dout, dlogsumexp, *, mask: Mask, scale
    ) -> tuple[Array, Array, Array]:
        """`gradients`, where the logsumexp `[B, N, T]` was a result, too.

        d(logits) of a query is weights * (dout v - dout out + dlogsumexp): a second
        backward pass, whose values are all 1, and whose outs are 0, gives the last.
        """
        pull = partial(self.gradients, mask=mask, scale=scale)
        dq, dk, dv = pull(q, k, v, out, logsumexp, dout)
        share = (dlogsumexp / v.shape[-1]).transpose(0, 2, 1)[..., None]
        share = jnp.broadcast_to(share, dout.shape).astype(dout.dtype)
        ones, zeros = jnp.ones_like(v), jnp.zeros_like(out)
        more_dq, more_dk, _ = pull(q, k, ones, zeros, logsumexp, share)
        dq, dk = (
            a.astype(jnp.float32) + b.astype(jnp.float32)
            for a, b in ((dq, more_dq), (dk, more_dk))
        )
        return dq, dk, dv

    def with_sinks(
        self, statistics: Statistics, sinks: Float[Array, "N"] | None
    ) -> Statistics:
        """Joined with one more key a head, of logit `sinks` and value 0; None: none.

        It is a key of every query: of those over all keys, join it once. `gradients`
        of the result are then those with sinks.
        """
        if sinks is None:
            return statistics
        out, logsumexp = statistics
        logits = jnp.zeros_like(logsumexp).at[0].set(sinks[:, None])
        return self.join(statistics, (jnp.zeros_like(out), logits))

    def sinks_gradient(
        self, sinks: Float[Array, "N"] | None, out, logsumexp, dout, dlogsumexp=None
    ) -> Float[Array, "N"] | None:
        """Over these queries, given out and logsumexp `[B, N, T]` over keys and sinks.

        d(logit) of a key is weight * (dout value - dout out + dlogsumexp), value = 0.
        """
        if sinks is None:
            return None
        shared = jnp.einsum(
            "BTNH,BTNH->BNT", dout, out, preferred_element_type=jnp.float32
        )
        if dlogsumexp is not None:
            shared = shared - dlogsumexp
        weights = jnp.exp(sinks[:, None] - logsumexp)
        return -(weights * shared).sum(axis=(0, 2))


def attention_of(parts: Parts, *, with_logsumexp: bool = False) -> Callable[..., Any]:
    """`f(q, k, v, mask=, scale=, sinks=None) -> out`, of parts that attend to all keys
    at once; `with_logsumexp` a pair, whose gradients are of both.

    Keeps out and logsumexp for the backward pass under the names "attention_out" and
    "attention_logsumexp". sinks: local float32 `[N]`, which count as `with_sinks` says.
    """

    def attention(q, k, v, *, mask: Mask, scale: float | None = None, sinks=None):
        mask = jax.tree.map(jnp.asarray, mask)
        return _attend(parts, with_logsumexp, scale, q, k, v, sinks, mask)

    return attention


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(parts: Parts, with_logsumexp: bool, scale, q, k, v, sinks, mask):
    return _forward(parts, with_logsumexp, scale, q, k, v, sinks, mask)[0]


def _forward(parts: Parts, with_logsumexp: bool, scale, q, k, v, sinks, mask):
    statistics = parts.statistics(q, k, v, mask=mask, scale=scale)
    out, logsumexp = parts.with_sinks(statistics, sinks)
    out = checkpoint_name(out.astype(q.dtype), "attention_out")
    logsumexp = checkpoint_name(logsumexp.sum(axis=0), "attention_logsumexp")
    results = (out, logsumexp) if with_logsumexp else out
    return results, (q, k, v, sinks, mask, out, logsumexp)


def _backward(parts: Parts, with_logsumexp: bool, scale, residuals, upstream):
    q, k, v, sinks, mask, *statistics = residuals
    pull = parts.gradients_of_both if with_logsumexp else parts.gradients
    upstream = upstream if with_logsumexp else (upstream,)
    gradients = pull(q, k, v, *statistics, *upstream, mask=mask, scale=scale)
    dsinks = parts.sinks_gradient(sinks, *statistics, *upstream)
    dq, dk, dv = (g.astype(x.dtype) for g, x in zip(gradients, (q, k, v), strict=True))
    return dq, dk, dv, dsinks, None


_attend.defvjp(_forward, _backward)
