"""Generation: against `transformers`, and against the whole sequence computed anew."""

import contextlib
import dataclasses
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType
from slow import slow_but_for

from ulysses_jax import Model, Transformer, layout, make_mesh
from ulysses_jax.complete import complete_model
from ulysses_jax.config import Lora, Rope
from ulysses_jax.costs.collectives import find_collectives
from ulysses_jax.costs.hlo import parse
from ulysses_jax.inference import generate
from ulysses_jax.inference.cache import cache_bytes
from ulysses_jax.inference.context import ContextMemory, remembered_bytes
from ulysses_jax.inference.decode import read_prompt, read_token
from ulysses_jax.inference.generation import stream, turned
from ulysses_jax.inference.request import Request
from ulysses_jax.inference.sampling import next_tokens
from ulysses_jax.inference.sent import token_bytes
from ulysses_jax.interop import from_pretrained
from ulysses_jax.weights.parameter import sharding_of
from ulysses_jax.weights.whole import unbind

FIXTURES = Path(__file__).parents[1] / "interop" / "fixtures"
NOT_GENERATED = ("gpt_oss",)  # a part alone
CASES = sorted({path.name for path in FIXTURES.iterdir()} - {*NOT_GENERATED})
MESHES = [
    dict(),
    dict(data=2, seq=4),
    dict(fsdp=2, seq=2, tensor=2),
    dict(seq=2, tensor=2),
    dict(fsdp=2, seq=4),
]


def mesh_of(degrees, kind=AxisType.Explicit):
    if not degrees:
        return contextlib.nullcontext()
    devices = jax.devices()[: int(np.prod(list(degrees.values())))]
    return jax.set_mesh(make_mesh(**degrees, devices=devices, axis_type=kind))


def fixture(case):
    with np.load(FIXTURES / case / "expected.npz") as file:
        tokens, generated = file["tokens"], file["generated"]
    return tokens[:, :12].tolist(), generated.tolist()


@pytest.mark.parametrize(
    "case, degrees",
    slow_but_for(
        [
            ("mistral", MESHES[0]),
            ("phi3", MESHES[0]),
            ("gpt2", MESHES[0]),
            ("qwen3", MESHES[1]),
        ],
        CASES,
        MESHES[:2],
    ),
)
def test_tokens_are_those_of_transformers(case, degrees):
    """Past the lengths, too, from which on dynamic and longrope turn otherwise; with 2
    or 3 key heads over 4 devices."""
    prompts, generated = fixture(case)
    with mesh_of(degrees, AxisType.Auto):
        model = from_pretrained(FIXTURES / case, compute_dtype="float32")
        assert generate(model, prompts, max_tokens=8) == generated
        if case in ("mistral", "phi3"):  # whose turns are of a row's own length
            mixed = [prompts[0], prompts[1] + prompts[0][:8]]
            assert generate(model, mixed, max_tokens=8)[0] == generated[0]


SIZES = Model(
    vocab_size=32,
    width=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    pattern=("window", "full"),
    window=6,
    sinks=True,
    query_key_norm=True,
    post_norms=True,
    attention_biases="all",
    attention_gate=True,
    attention_scale=0.4,
    embedding_scale=3.0,
    rope=Rope(base=100.0, window_base=30.0),
    compute_dtype="float32",
)
ADAPTED = dataclasses.replace(SIZES, lora=Lora(rank=2, targets=("all",)))
PROMPTS = [[5, 3, 8, 1, 9, 2, 7], [4] * 3 + list(range(20)), [31]]
NEW = 8
CONTEXT = ContextMemory(8, 16, 8, 2, 2)


def made(model=ADAPTED):
    """The same random parameters on any mesh."""
    abstract = nnx.eval_shape(lambda: Transformer(model, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    rng = np.random.default_rng(0)
    for path, variable in nnx.to_flat_state(state):
        noise = rng.normal(size=variable.shape).astype(np.float32)
        is_scale = path[-1] in ("scale", "q_norm", "k_norm")
        value = 1 + 0.2 * noise if is_scale else 0.3 * noise
        if path[-1] == "sinks":
            value = 2 * noise
        variable.set_value(jax.device_put(value, sharding_of(variable)))
    return nnx.merge(graph, state)


@pytest.fixture(scope="module")
def alone():
    """Each prompt's continuation by whole forward passes: greedy, and drawn."""
    model, found = made(), {}
    for drawn, place in itertools.product((False, True), range(len(PROMPTS))):
        row = list(PROMPTS[place])
        for step in range(NEW):
            padded = np.array([row + [0] * (64 - len(row))])
            logits = model(padded)[:, len(row) - 1]
            logits = jnp.broadcast_to(logits, (len(PROMPTS), *logits.shape[1:]))
            new = next_tokens(logits, 3, step, 0.9, 0.8, greedy=not drawn)
            row.append(int(new[place]))
        found[drawn, place] = row[-NEW:]
    return found


@pytest.mark.parametrize(
    "degrees, kind",
    slow_but_for(
        [(MESHES[2], AxisType.Explicit)],
        MESHES,
        [AxisType.Auto, AxisType.Explicit],
    ),
)
def test_tokens_are_those_of_whole_forward_passes(alone, degrees, kind):
    """Rows of unequal lengths in one batch, each as if it were alone; greedy and drawn.
    Windows, sinks, norms, biases, scales, adapters; 2 key heads over 1 to 4 devices."""
    with mesh_of(degrees, kind):
        model = made()
        for drawn in (False, True):
            options = dict(temperature=0.9 if drawn else 0.0, top_p=0.8, seed=3)
            got = generate(model, PROMPTS, max_tokens=NEW, **options)
            assert got == [alone[drawn, place] for place in range(len(PROMPTS))]
    assert alone[False, 0] != alone[True, 0]


def test_a_row_ends(alone):
    """And is not shown from there on; the others go on. On one device."""
    row = alone[False, 1]
    last = next(i for i in range(3, NEW) if row[i] not in row[:i])
    end = row[last]
    model = made()
    steps = list(stream(model, PROMPTS, Request(max_tokens=NEW, ends=(end,))))
    shown = [step[1] for step in steps[: last + 2]]
    assert shown == [*row[: last + 1], None]
    rows = [[new for new in row if new is not None] for row in zip(*steps, strict=True)]
    assert rows == generate(model, PROMPTS, max_tokens=NEW, ends=[end])
    for place, row in enumerate(rows):
        want = alone[False, place]
        assert row == want[: want.index(end) + 1 if end in want else NEW]
    soon = generate(model, PROMPTS, max_tokens=NEW, ends=range(32))
    assert soon == [alone[False, place][:1] for place in range(3)]


def traced(model, num_tokens, cache_tokens, rows=2, context=None):
    """Both programs, of a model on the mesh that is set."""
    module, values = unbind(model)
    lengths = np.full(rows, num_tokens, np.int32)
    tokens = np.zeros((rows, num_tokens), np.int32)
    positions = np.broadcast_to(np.arange(num_tokens), tokens.shape)
    angles = turned(model.model, positions, lengths)
    prompt = read_prompt.trace(
        module, cache_tokens, context, values, tokens, lengths, angles
    )
    cache = prompt.out_info[1]
    angles = turned(model.model, positions[:, :1], lengths)
    token = read_token.trace(module, context, values, cache, lengths, lengths, angles)
    return prompt, token


def arrays_of(jaxpr):
    """All that a program makes."""
    for equation in jaxpr.eqns:
        yield from (each.aval for each in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from arrays_of(inner)


def test_the_cache_is_spread_by_heads_and_logits_are_of_one_token():
    """Two key heads over tensor 1 x seq 4: each lies on two devices, never on all."""
    big = dataclasses.replace(SIZES, vocab_size=4096)
    with mesh_of(dict(data=2, seq=4)):
        prompt, _ = traced(made(big), 64, 128)
        logits, cache = prompt.out_info
        (window, _), (full, _), (rest, _) = cache
        assert window.shape == (1, 2, 6, 4, 8)  # [L, B, S, slots, H]: its last tokens
        assert full.shape == (1, 2, 128, 4, 8) and rest.shape == (2, 6, 4, 8)
        local = full.sharding.shard_shape(full.shape)
        assert local == (1, 1, 128, 1, 8)
        kept = (6 + 6 + 128) * 2 * 8 * 4
        assert cache_bytes(big, 2, 128) == kept
        assert logits.shape == (2, 4096)
        largest = max(each.size for each in arrays_of(prompt.jaxpr.jaxpr))
        assert largest < 64 * 4096, "[T, V]"


@pytest.mark.parametrize(
    "degrees", slow_but_for([MESHES[2]], [*MESHES[1:], dict(seq=8)])
)
@pytest.mark.parametrize("context", [None, CONTEXT], ids=["all", "context"])
def test_what_a_token_sends(degrees, context):
    """As the formula says, from the compiled program: no weight among it; and the cache
    is written in place."""
    with mesh_of(degrees):
        _, token = traced(made(SIZES), 64, 128, rows=4, context=context)
        axes = layout.axes()
        program = token.lower().compile()
        module = parse(program.as_text())
        sent = find_collectives(module, axes, 8)
        rows = 4 // layout.degree("data", "fsdp")
        model = complete_model(SIZES)
        want = token_bytes(model, rows, 128 // 8 if context else 0)
        cache = cache_bytes(model, 4, 128)
        if context:
            cache += remembered_bytes(model, context, 4, 128)
    assert {each.kind for each in sent} == {"all-gather", "all-reduce"}
    assert sum(each.count * each.sent_bytes for each in sent) == sum(want.values())
    assert program.memory_analysis().alias_size_in_bytes == cache
