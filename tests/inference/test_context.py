"""What a token reads with a context memory, beside a loop over tokens in float64."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from files import ROOT, module_of
from flax import nnx

from ulysses_jax import Model, Transformer, make_mesh
from ulysses_jax.complete import complete_model
from ulysses_jax.inference import generate
from ulysses_jax.inference.context import (
    ContextMemory,
    attend_to_remembered,
    remembered_from_prompt,
    written_remembered,
)

MEMORY = ContextMemory(
    initial_tokens=4,
    window_tokens=8,
    block_tokens=4,
    num_blocks=2,
    representatives=2,
)
MODEL = Model(
    vocab_size=64,
    width=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=16,
    compute_dtype="float32",
)
MESHES = [{}, dict(seq=2), dict(seq=8), dict(data=2, seq=2, tensor=2)]
PLACES, PROMPTS, STEPS = 64, np.array([41, 30], np.int32), 20


def rows(seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(2, PLACES, n, 16)) for n in (4, 2, 2))
    for at in range(12, PLACES):  # the block that leaves the window is often the best
        q[:, at] += np.repeat(k[:, at - 12 : at - 8].mean(axis=1), 2, axis=1)
    return q, k, v


def read_by(q, k, v, position):
    """Positions that a token reads of one row, `[T, n, H]`."""
    size, window = MEMORY.block_tokens, MEMORY.window_tokens
    keys = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    begin = max(max(position - 1 - window, 0) // size * size, MEMORY.initial_tokens)
    scores = {}
    for first in range(MEMORY.initial_tokens, begin, size):
        score = 0.0
        for head in range(q.shape[1]):
            sums = [
                sum(q[at + j, head] @ keys[at, head] for j in range(1, window + 1))
                for at in range(first, first + size)
            ]
            best = np.argsort(sums)[-MEMORY.representatives :]
            score += q[position, head] @ keys[first + best, head].mean(axis=0)
        scores[first] = score
    chosen = sorted(scores, key=scores.__getitem__)[-MEMORY.num_blocks :]
    blocks = [range(first, first + size) for first in chosen]
    initial = range(min(MEMORY.initial_tokens, position))
    return sorted({*initial, *range(begin, position + 1), *sum(map(list, blocks), [])})


def attended(q, k, v, position):
    read = read_by(q, k, v, position)
    keys, values = (np.repeat(x[read], 2, axis=1) for x in (k, v))
    logits = np.einsum("nh,tnh->nt", q[position], keys) / 4
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    return np.einsum("nt,tnh->nh", weights, values)


@pytest.mark.parametrize("degrees", MESHES, ids=str)
def test_a_token_reads_what_the_paper_says(degrees):
    """From two prompts on, through the window, blocks that leave it among them."""
    q, k, v = rows()
    with jax.set_mesh(make_mesh(**degrees, devices=some(degrees))):
        model = complete_model(MODEL)
        lengths = jnp.asarray(PROMPTS)
        arrays = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
        start = jax.jit(
            partial(remembered_from_prompt, model, MEMORY, num_places=PLACES)
        )

        @jax.jit
        def step(remembered, arrays, lengths):
            one = [
                jnp.take_along_axis(x, lengths[:, None, None, None], axis=1)
                for x in arrays
            ]
            out, left = attend_to_remembered(
                model,
                MEMORY,
                one[0],
                (one[1], one[2]),
                remembered,
                lengths,
                scale=None,
                sinks=None,
            )
            return out, written_remembered(
                MEMORY, remembered, left, lengths, stacked=False
            )

        remembered = start(*arrays, lengths)
        for _ in range(STEPS):
            out, remembered = step(remembered, arrays, lengths)
            of = zip(q, k, v, lengths.tolist(), strict=True)
            want = [attended(*row) for row in of]
            np.testing.assert_allclose(out[:, 0], want, rtol=1e-5, atol=1e-5)
            lengths = lengths + 1
        # What tokens left one by one is what a prompt of all of them leaves.
        anew = start(*arrays, lengths)
        out = int(lengths.min()) - MEMORY.window_tokens
        whole = out // MEMORY.block_tokens
        np.testing.assert_allclose(
            remembered.blocks[:, :whole], anew.blocks[:, :whole], rtol=1e-5, atol=1e-5
        )
        np.testing.assert_allclose(remembered.sums, anew.sums, rtol=1e-4, atol=1e-4)


def some(degrees):
    return jax.devices()[: int(np.prod([*degrees.values()], dtype=int))]


LONG = [list(np.random.default_rng(1).integers(0, 64, 50)), [3, 1, 2] * 6]


@pytest.fixture(scope="module")
def model():
    return Transformer(MODEL, rngs=nnx.Rngs(0))


def continued(model, **options):
    return generate(model, LONG, max_tokens=12, **options)


def test_it_is_exact_while_all_fits(model):
    """Also where the cache is larger than what is read; and else it is not."""
    whole = continued(model, cache_tokens=128)
    fits = dataclasses.replace(MEMORY, num_blocks=13)
    assert fits.read_tokens < 128
    assert continued(model, cache_tokens=128, context=fits) == whole
    assert continued(model, context=ContextMemory()) == whole
    assert continued(model, context=dataclasses.replace(MEMORY, num_blocks=0)) != whole


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_blocks=13), "up to 68 tokens (4 initial, a window of 8, 13 blocks "
         "of 4, and one that leaves the window), and the cache holds, by "
         "cache-tokens, 64: use context.num-blocks 12, cache-tokens 68, or no "
         "context memory"),
        (dict(window_tokens=64), "use cache-tokens 80, or no context memory"),
        (dict(initial_tokens=6), "6 is no number of whole blocks of "
         "context.block-tokens 4: use 4 or 8"),
        (dict(representatives=5), "context.representatives 5 is more than a block has"),
        (dict(window_tokens=0), "context.window-tokens 0 is not from 1 to"),
        (dict(block_tokens=1.5), "context.block-tokens is a whole number, not 1.5"),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)  # fmt: skip
def test_what_is_refused(model, changes, message, monkeypatch):
    """Before anything is compiled; the remedy is taken."""
    from ulysses_jax.inference import generation

    monkeypatch.setattr(generation, "read_prompt", None)
    context = dataclasses.replace(MEMORY, **changes)
    with pytest.raises(ValueError) as error:
        continued(model, cache_tokens=64, context=context)
    assert message in str(error.value)


def test_its_remedy_is_taken(model):
    assert continued(
        model, cache_tokens=64, context=dataclasses.replace(MEMORY, num_blocks=12)
    )


@pytest.mark.slow
def test_a_needle_behind_the_window_is_found(monkeypatch):
    """256 tokens with 16 needles, of which a token reads 72; by the window alone, and
    by all."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # it takes rows from recall.py
    benchmark = module_of("benchmarks/context.py")
    recall = benchmark.recall
    model = benchmark.trained(recall.SHORT, ((256, 4, 30),))
    memory = ContextMemory(8, 16, 8, num_blocks=5, representatives=8)
    alone = dataclasses.replace(memory, num_blocks=0)
    with jax.set_mesh(make_mesh(seq=8)):
        model = recall.on_mesh(model)
        all_of_it, found, window = (
            np.mean(benchmark.found(model, context, 256, 10))
            for context in (None, memory, alone)
        )
    assert all_of_it > 0.9
    assert found > 0.8
    assert window < 0.3
