"""Dense attention in NumPy's float64, forward and backward: how true is a kernel?"""

import numpy as np


def exact_attention(q, k, v, upstream, seen, *, scale=None, sinks=None, rows=512):
    """out, dq, dk, dv in float64, of arrays as they are; dsinks where there are sinks.

    Given some queries alone, it returns what of dk, dv and dsinks is theirs: all, where
    the upstream of every other query is 0.

    Args:
      q, upstream, k, v: `[B, T, N, H]`, `[B, S, K, H]`, any dtype.
      seen: bool, broadcasts to `[B, T, S]`.
      sinks: `[N]`, logits of one more key a head, whose value is 0.
      rows: queries at a time, of which there are `rows` x S logits a head.
    """
    q, k, v, upstream = (np.asarray(x).astype(np.float64) for x in (q, k, v, upstream))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    groups = q.shape[2] // k.shape[2]
    keys, values = (np.repeat(x, groups, axis=2).swapaxes(1, 2) for x in (k, v))
    seen = np.broadcast_to(seen, (q.shape[0], q.shape[1], k.shape[1]))[:, None]
    others = np.full((q.shape[2], 1, 1), -np.inf)
    if sinks is not None:
        others[:, 0, 0] = np.asarray(sinks)
    dsinks = np.zeros(q.shape[2])
    out, dq = np.empty_like(q), np.empty_like(q)
    dkeys, dvalues = np.zeros_like(keys), np.zeros_like(values)
    for start in range(0, q.shape[1], rows):
        part = slice(start, start + rows)
        query, dout = (x[:, part].swapaxes(1, 2) for x in (q, upstream))
        logits = query @ keys.swapaxes(2, 3) * scale
        logits = np.where(seen[:, :, part], logits, -np.inf)
        highest = np.maximum(logits.max(axis=3, keepdims=True), others)
        highest = np.where(np.isinf(highest), 0, highest)
        weights, of_sinks = np.exp(logits - highest), np.exp(others - highest)
        total = np.maximum(weights.sum(axis=3, keepdims=True) + of_sinks, 1e-300)
        weights /= total
        its_out, dweights = weights @ values, dout @ values.swapaxes(2, 3)
        shared = (dout * its_out).sum(axis=3, keepdims=True)
        dlogits = weights * (dweights - shared) * scale
        dsinks -= (of_sinks / total * shared).sum(axis=(0, 2, 3))
        out[:, part] = its_out.swapaxes(1, 2)
        dq[:, part] = (dlogits @ keys).swapaxes(1, 2)
        dkeys += dlogits.swapaxes(2, 3) @ query
        dvalues += weights.swapaxes(2, 3) @ dout

    def of_kv_heads(x):
        x = x.swapaxes(1, 2)
        return x.reshape(*x.shape[:2], k.shape[2], groups, -1).sum(axis=3)

    results = out, dq, of_kv_heads(dkeys), of_kv_heads(dvalues)
    return results if sinks is None else (*results, dsinks)
