"""What a token reads with a context memory, beside a loop over tokens in float64."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from files import ROOT, module_of
from flax import nnx
from slow import slow_but_for

from ulysses_jax import Model, Transformer, make_mesh
from ulysses_jax.complete import complete_model
from ulysses_jax.config import Rope
from ulysses_jax.inference import generate
from ulysses_jax.inference.context import (
    ContextMemory,
    attend_to_remembered,
    remembered_from_prompt,
    written_remembered,
)
from ulysses_jax.inference.request import Request, check_request

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
ONE = dict(data=1)
MESHES = [ONE, dict(seq=2), dict(seq=4), dict(seq=8), dict(data=2, seq=2, tensor=2)]
PLACES, PROMPTS, STEPS = 64, (41, 30), 20


def memory(**changes):
    return dataclasses.replace(MEMORY, **changes)


def rows(num_heads, num_kv_heads, dtype):
    """q, k, v as they are in the dtype, in float64."""
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.normal(size=(2, PLACES, n, 16))
        for n in (num_heads, num_kv_heads, num_kv_heads)
    )
    groups = num_heads // num_kv_heads
    for at in range(12, PLACES):  # the block that leaves the window is often the best
        q[:, at] += np.repeat(k[:, at - 12 : at - 8].mean(axis=1), groups, axis=1)
    return [np.asarray(jnp.asarray(x, dtype), np.float64) for x in (q, k, v)]


def read_by(memory, q, k, v, position):
    """Positions that a token reads of one row, `[T, n, H]`."""
    size, window = memory.block_tokens, memory.window_tokens
    keys = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    begin = max(max(position - 1 - window, 0) // size * size, memory.initial_tokens)
    scores = {}
    for first in range(memory.initial_tokens, begin, size):
        score = 0.0
        for head in range(q.shape[1]):
            sums = [
                sum(q[at + j, head] @ keys[at, head] for j in range(1, window + 1))
                for at in range(first, first + size)
            ]
            best = np.argsort(sums)[-memory.representatives :]
            score += q[position, head] @ keys[first + best, head].mean(axis=0)
        scores[first] = score
    chosen = sorted(scores, key=scores.__getitem__, reverse=True)[: memory.num_blocks]
    blocks = [range(first, first + size) for first in chosen]
    before = {*range(min(memory.initial_tokens, position)), *range(begin, position)}
    return sorted({*before, position, *sum(map(list, blocks), [])})


def attended(memory, sinks, q, k, v, position):
    read = read_by(memory, q, k, v, position)
    keys, values = (
        np.repeat(x[read], q.shape[1] // x.shape[1], axis=1) for x in (k, v)
    )
    weights = np.exp(np.einsum("nh,tnh->nt", q[position], keys) / 4)
    whole = weights.sum(axis=1) + (0 if sinks is None else np.exp(sinks))
    return np.einsum("nt,tnh->nh", weights / whole[:, None], values)


def case(degrees=ONE, prompts=PROMPTS, places=PLACES, heads=(4, 2), **others):
    return dict(degrees=degrees, prompts=prompts, places=places, heads=heads, **others)


UNEVEN = dict(seq=4, tensor=2)
CASES = {str(degrees): case(degrees) for degrees in MESHES} | {
    "prompts shorter than the initial tokens": case(prompts=(1, 3)),
    "one short, one long": case(dict(data=2, seq=4), prompts=(2, 41)),
    "no initial tokens": case(memory=memory(initial_tokens=0)),
    "a window of one": case(memory=memory(window_tokens=1)),
    "a window of no whole blocks": case(memory=memory(window_tokens=9)),
    "a window longer than the prompts": case(
        prompts=(30, 44), memory=memory(window_tokens=50, num_blocks=1)
    ),
    "no blocks": case(memory=memory(num_blocks=0)),
    "more blocks than there are": case(memory=memory(num_blocks=40)),
    "blocks of a token": case(memory=memory(block_tokens=1, representatives=1)),
    "all keys of a block": case(memory=memory(representatives=4)),
    "a cache of no whole blocks": case(places=62),
    "uneven heads": case(UNEVEN, heads=(12, 4)),
    "uneven heads and sinks": case(UNEVEN, heads=(6, 2), sinks=np.linspace(-1, 2, 6)),
    "one key head": case(dict(seq=8), heads=(8, 1)),
    "bfloat16": case(dict(seq=2), prompts=(50, 30), places=63, dtype="bfloat16"),
}
QUICK = [str(ONE), str(MESHES[-1]), "one short, one long", "uneven heads and sinks"]
QUICK += ["bfloat16"]


@pytest.mark.parametrize("name", slow_but_for(QUICK, CASES))
def test_a_token_reads_what_the_paper_says(name):
    """From two prompts on, through the window, blocks that leave it among them."""
    its = CASES[name]
    prompts, places, sinks = its["prompts"], its["places"], its.get("sinks")
    (num_heads, num_kv_heads), degrees = its["heads"], its["degrees"]
    dtype, context = its.get("dtype", "float32"), its.get("memory", MEMORY)
    q, k, v = rows(num_heads, num_kv_heads, dtype)
    size = dict(num_heads=num_heads, num_kv_heads=num_kv_heads, compute_dtype=dtype)
    with jax.set_mesh(make_mesh(**degrees, devices=some(degrees))):
        model = complete_model(dataclasses.replace(MODEL, **size))
        lengths = jnp.asarray(prompts, jnp.int32)
        arrays = [jnp.asarray(x, dtype) for x in (q, k, v)]
        start = jax.jit(
            partial(remembered_from_prompt, model, context, num_places=places)
        )

        @jax.jit
        def step(remembered, arrays, lengths):
            one = [
                jnp.take_along_axis(x, lengths[:, None, None, None], axis=1)
                for x in arrays
            ]
            out, left = attend_to_remembered(
                model,
                context,
                one[0],
                (one[1], one[2]),
                remembered,
                lengths,
                scale=None,
                sinks=None if sinks is None else jnp.asarray(sinks, jnp.float32),
            )
            return out, written_remembered(
                context, remembered, left, lengths, stacked=False
            )

        remembered = start(*arrays, lengths)
        close = 1e-5 if dtype == "float32" else 2**-6
        for _ in range(min(STEPS, places - max(prompts))):
            out, remembered = step(remembered, arrays, lengths)
            assert out.dtype == dtype
            of = zip(q, k, v, lengths.tolist(), strict=True)
            want = [attended(context, sinks, *row) for row in of]
            got = np.asarray(out[:, 0], np.float64)
            np.testing.assert_allclose(got, want, rtol=close, atol=close)
            lengths = lengths + 1
        if name not in map(str, MESHES):
            return
        # What tokens left one by one is what a prompt of all of them leaves.
        anew = start(*arrays, lengths)
        out = int(lengths.min()) - context.window_tokens
        whole = out // context.block_tokens
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


@pytest.mark.slow
def test_beside_windows_and_past_longropes_length():
    """All is read anew there, and a memory made of it; sinks are there, too."""
    factors = tuple(np.linspace(1, 4, 8).tolist())
    rope = Rope(
        scaling="longrope",
        original_tokens=56,
        short_factors=(1.0,) * 8,
        long_factors=factors,
    )
    size = dict(pattern=("window", "full"), window=6, sinks=True, rope=rope)
    model = Transformer(dataclasses.replace(MODEL, **size), rngs=nnx.Rngs(0))
    whole = continued(model, cache_tokens=128)
    fits = memory(num_blocks=13)
    assert continued(model, cache_tokens=128, context=fits) == whole
    part = continued(model, cache_tokens=128, context=memory(num_blocks=1))
    assert part != whole
    with jax.set_mesh(make_mesh(seq=2, tensor=2, devices=jax.devices()[:4])):
        model = Transformer(model.model, rngs=nnx.Rngs(0))
        found = continued(model, cache_tokens=128, context=memory(num_blocks=1))
    assert found == part


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
    with pytest.raises(ValueError, match="ContextMemory, not 16: give ContextMemory"):
        continued(model, context=16)


@pytest.mark.parametrize(
    "cache_tokens, context",
    [(64, memory(num_blocks=12)), (68, memory(num_blocks=13)), (64, None)],
    ids=["fewer blocks", "a larger cache", "no memory"],
)
def test_its_remedies_work(model, cache_tokens, context):
    """Those of a memory larger than the cache."""
    request = Request(max_tokens=12, cache_tokens=cache_tokens, context=context)
    check_request(request, LONG, complete_model(model.model))


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
