"""Each kind's function token by token in float64, what it is called with, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ulysses_jax import (
    gated_delta_rule,
    linear_attention,
    low_rank_attention,
    short_convolution,
)

B, T, K, N, H, V, R = 2, 32, 2, 4, 6, 8, 3
FUNCTIONS = {
    "linear": functools.partial(linear_attention, chunk_tokens=3),
    "delta": functools.partial(gated_delta_rule, chunk_tokens=3, unit_lengths=False),
    "convolution": short_convolution,
    "low_rank": low_rank_attention,
}
NAMES = {
    "linear": ("q", "k", "v", "log_decay"),
    "delta": ("q", "k", "v", "log_decay", "beta"),
    "convolution": ("x", "weights"),
    "low_rank": ("q", "k", "v", "projection"),
}

# Documents that end inside a shard, at its end, and that are longer than one; a number
# may come back, as another document.
DOCUMENTS = np.asarray(
    [[1] * 5 + [2] * 14 + [3] * 13, [1] * 8 + [0] * 8 + [1] * 1 + [2] * 15], np.int32
)
ONE = np.zeros((B, T), np.int32)


def inputs(kind, dtype=jnp.float32):
    """By name; keys are of unit length, as the delta rule needs them."""
    rng = np.random.default_rng(len(kind))

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    if kind == "convolution":
        arrays = dict(x=normal(B, T, N, H), weights=normal(4, N, H))
        return {name: jnp.asarray(x, dtype) for name, x in arrays.items()}
    if kind == "low_rank":
        arrays = dict(q=normal(B, T, N, H), k=normal(B, T, K, H), v=normal(B, T, K, V))
        arrays["projection"] = 3 * normal(B, T, K, R)  # some tokens count for much
        return {name: jnp.asarray(x, dtype) for name, x in arrays.items()}
    q, k, v = normal(B, T, K, H), normal(B, T, K, H), normal(B, T, N, V)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    given = {n: jnp.asarray(x, dtype) for n, x in dict(q=q, k=k, v=v).items()}
    # From almost none to one that leaves nothing.
    given["log_decay"] = jnp.asarray(-np.exp(2 * normal(B, T, N) - 2))
    if kind == "delta":
        given["beta"] = jnp.asarray(1 / (1 + np.exp(-normal(B, T, N))))
    return given


def upstream(kind):
    shape = (B, T, N, H if kind == "convolution" else V)
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


def exact(kind, given, documents, scale=H**-0.5):
    """The output and the gradients of all inputs, `{name: float64}`, "out" among them.

    Args:
      given: of `inputs`.
      documents: `[B, T]`; low rank has none.
    """
    with jax.enable_x64(True):
        given = {n: jnp.asarray(np.asarray(x, np.float64)) for n, x in given.items()}
        out, pull = jax.vjp(lambda given: rule(kind, given, documents, scale), given)
        (gradients,) = pull(jnp.asarray(upstream(kind), np.float64))
        return {n: np.asarray(x) for n, x in (gradients | {"out": out}).items()}


def rule(kind, given, documents, scale=H**-0.5):
    """The output alone, in the dtype that is given."""
    begins = np.ones(documents.shape, bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    rules = {"linear": _linear, "delta": _delta, "convolution": _convolution}
    rules["low_rank"] = _low_rank
    return rules[kind](given, begins, scale)


def _linear(given, begins, scale):
    return _delta(
        given | {"beta": jnp.ones_like(given["log_decay"])}, begins, scale, erase=0.0
    )


def _delta(given, begins, scale, erase=1.0):
    groups = given["v"].shape[2] // given["k"].shape[2]
    q, k = (jnp.repeat(given[name], groups, axis=2) for name in "qk")

    def one_token(state, now):
        q, k, v, log_decay, beta, begins = now
        state = jnp.where(begins[:, None, None, None], 0, state)
        state = state * jnp.exp(log_decay)[..., None, None]
        found = jnp.einsum("bnh,bnhv->bnv", k, state)
        change = beta[..., None] * (v - erase * found)
        state = state + k[..., None] * change[..., None, :]
        return state, scale * jnp.einsum("bnh,bnhv->bnv", q, state)

    tokens = (q, k, given["v"], given["log_decay"], given["beta"], begins)
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    state = jnp.zeros((*k.shape[:1], *k.shape[2:], given["v"].shape[-1]))
    return jnp.moveaxis(jax.lax.scan(one_token, state, tokens)[1], 0, 1)


def _convolution(given, begins, scale):
    x, weights = given["x"], given["weights"]
    out = []
    for t in range(x.shape[1]):
        total, alive = jnp.zeros(x[:, t].shape), np.ones(len(x))
        for d in range(min(4, t + 1)):
            total += weights[3 - d] * x[:, t - d] * alive[:, None, None]
            alive = alive * ~begins[:, t - d]
        out.append(total)
    return jnp.stack(out, axis=1)


def _low_rank(given, begins, scale):
    weights = jax.nn.softmax(given["projection"], axis=1)
    keys, values = (
        jnp.repeat(jnp.einsum("btkr,btkh->brkh", weights, given[name]), N // K, axis=2)
        for name in "kv"
    )
    scores = scale * jnp.einsum("btnh,brnh->btnr", given["q"], keys)
    return jnp.einsum("btnr,brnv->btnv", jax.nn.softmax(scores), values)


def results(function, kind, given):
    """As `exact`, of a function of the inputs by name."""

    def weighted(given):
        out = function(**given)
        return jnp.sum(out.astype(jnp.float32) * upstream(kind)), out

    gradients, out = jax.jit(jax.grad(weighted, has_aux=True))(given)
    return {n: np.asarray(x, np.float32) for n, x in (gradients | {"out": out}).items()}


def assert_close(got, want, tolerance=2e-5):
    """Relative to the greatest element."""
    assert set(got) == set(want)
    for name in want:
        most = np.abs(want[name]).max()
        error = np.abs(got[name] - want[name]).max() / most
        assert error < tolerance, (name, error)
