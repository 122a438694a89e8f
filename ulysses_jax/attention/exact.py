"""Dense attention in float64, forward and backward: how true is a kernel?"""

from typing import Any

import numpy as np


def exact_attention(
    q, k, v, upstream, seen, *, scale=None, sinks=None, rows=512, numpy: Any = np
) -> tuple[Any, ...]:
    """out, dq, dk, dv in float64, of arrays as they are; dsinks where there are sinks.

    Given some queries alone, it returns what of dk, dv and dsinks is theirs: all, where
    the upstream of every other query is 0.

    Args:
      q, upstream, k, v: `[B, T, N, H]`, `[B, S, K, H]`, any dtype.
      seen: bool, broadcasts to `[B, T, S]`.
      sinks: `[N]`, logits of one more key a head, whose value is 0.
      rows: queries at a time, of which there are `rows` x S logits a head.
      numpy: NumPy, or `jax.numpy` inside `jax.enable_x64`, which has a device do it.
    """

    def exact(x):
        return numpy.asarray(x).astype(numpy.float64)

    q, k, v, upstream = map(exact, (q, k, v, upstream))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    groups = q.shape[2] // k.shape[2]
    keys, values = (numpy.repeat(x, groups, axis=2).swapaxes(1, 2) for x in (k, v))
    seen = numpy.broadcast_to(seen, (q.shape[0], q.shape[1], k.shape[1]))[:, None]
    others = numpy.full(q.shape[2], -np.inf) if sinks is None else exact(sinks)
    others = others[:, None, None]
    dkeys = dvalues = dsinks = 0.0
    outs, dqs = [], []
    for start in range(0, q.shape[1], rows):
        part = slice(start, start + rows)
        query, dout = (x[:, part].swapaxes(1, 2) for x in (q, upstream))
        logits = query @ keys.swapaxes(2, 3) * scale
        logits = numpy.where(seen[:, :, part], logits, -np.inf)
        highest = numpy.maximum(logits.max(axis=3, keepdims=True), others)
        highest = numpy.where(numpy.isinf(highest), 0, highest)
        weights, of_sinks = numpy.exp(logits - highest), numpy.exp(others - highest)
        total = weights.sum(axis=3, keepdims=True) + of_sinks
        total = numpy.maximum(total, 1e-300)
        weights /= total
        out, dweights = weights @ values, dout @ values.swapaxes(2, 3)
        shared = (dout * out).sum(axis=3, keepdims=True)
        dlogits = weights * (dweights - shared) * scale
        dsinks -= (of_sinks / total * shared).sum(axis=(0, 2, 3))
        outs.append(out.swapaxes(1, 2))
        dqs.append((dlogits @ keys).swapaxes(1, 2))
        dkeys += dlogits.swapaxes(2, 3) @ query
        dvalues += weights.swapaxes(2, 3) @ dout

    def of_kv_heads(x):
        x = x.swapaxes(1, 2)
        return x.reshape(*x.shape[:2], k.shape[2], groups, -1).sum(axis=3)

    out, dq = (numpy.concatenate(x, axis=1) for x in (outs, dqs))
    results = out, dq, of_kv_heads(dkeys), of_kv_heads(dvalues)
    return results if sinks is None else (*results, dsinks)
