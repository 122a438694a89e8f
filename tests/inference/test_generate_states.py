"""Generation with layers of a state: against the whole sequence computed anew."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from slow import slow_but_for
from test_generate import CONTEXT, MESHES, NEW, SIZES, made, mesh_of, traced

from ulysses_jax import Transformer, layout
from ulysses_jax.complete import complete_model
from ulysses_jax.costs.collectives import find_collectives
from ulysses_jax.costs.hlo import parse
from ulysses_jax.inference import generate
from ulysses_jax.inference.cache import cache_bytes
from ulysses_jax.inference.context import Remembered, remembered_bytes
from ulysses_jax.inference.decode import read_prompt, read_token
from ulysses_jax.inference.generation import turned
from ulysses_jax.inference.request import Request, check_request
from ulysses_jax.inference.sent import token_bytes
from ulysses_jax.inference.states import states_bytes
from ulysses_jax.weights.whole import unbind

# One that reaches into the second half of 64 tokens; one shorter than a convolution.
PROMPTS = [[5, 3, 8, 1, 9, 2, 7], [4] * 8 + list(range(32)), [31]]
HYBRID = dataclasses.replace(
    SIZES,
    num_layers=5,
    pattern=("delta", "linear", "window", "full"),
    delta_heads=8,
    delta_key_heads=4,
    delta_key_size=4,
    delta_value_size=8,
)
PURE = dataclasses.replace(
    SIZES,
    pattern=("linear", "delta"),
    window=None,
    sinks=False,
    query_key_norm=False,
    attention_gate=False,
    positions="learned",
    max_positions=64,
)

SIZE = {"HYBRID": HYBRID, "PURE": PURE}


@pytest.fixture(scope="module")
def alone():
    """Each prompt's continuation by whole forward passes."""
    found = {}
    for name, size in SIZE.items():
        model, found[name] = made(size), []
        for row in map(list, PROMPTS):
            for _ in range(NEW):
                padded = np.array([row + [0] * (64 - len(row))])
                row.append(int(jnp.argmax(model(padded)[0, len(row) - 1])))
            found[name].append(row[-NEW:])
    return found


@pytest.mark.parametrize(
    "name, degrees, kind",
    slow_but_for(
        [("HYBRID", MESHES[2], AxisType.Explicit)],
        ["HYBRID", "PURE"],
        [*MESHES, dict(seq=8)],
        [AxisType.Auto, AxisType.Explicit],
    ),
)
def test_tokens_are_those_of_whole_forward_passes(alone, name, degrees, kind):
    """Rows of unequal lengths in one batch, each as if it were alone."""
    with mesh_of(degrees, kind):
        got = generate(made(SIZE[name]), PROMPTS, max_tokens=NEW)
    assert got == alone[name]


def test_what_is_kept_and_what_a_token_sends():
    """A state does not grow with the row, and is written in place; it sends nothing."""
    with mesh_of(dict(data=2, seq=2, tensor=2)):
        for tokens in (64, 128):
            prompt, token = traced(made(HYBRID), tokens, 128, rows=4)
            delta, linear, window, _, rest = prompt.out_info[1]
            assert linear.before == () and linear.state.shape == (1, 4, 4, 8, 8)
            assert delta.state.shape == (1, 4, 8, 4, 8)  # [L, B, N, H, V]
            local = delta.state.sharding.shard_shape(delta.state.shape)
            assert local == (1, 2, 4, 4, 8)
            sizes = [x.shape[2:] for x in delta.before]  # of q, k and v
            assert sizes == [(3, 4, 4), (3, 4, 4), (3, 8, 8)]
            assert rest.state.shape == (4, 8, 4, 8)
        program = token.lower().compile()
        sent = find_collectives(parse(program.as_text()), layout.axes(), 8)
        model = complete_model(HYBRID)
        want = token_bytes(model, 2)
        held = cache_bytes(model, 4, 128) + states_bytes(model, 4)
        kept = 2 * (8 * 4 * 8 + 3 * (2 * 4 * 4 + 8 * 8)) + 4 * 8 * 8
        assert states_bytes(model, 4) == 2 * 4 * kept // 2
    assert program.memory_analysis().alias_size_in_bytes == held
    assert sum(each.count * each.sent_bytes for each in sent) == sum(want.values())


def long_memories(size):
    """A state is felt by hundreds of tokens, not by a few."""
    model = made(size)
    for layer in (*model.layers, *model.rest):
        if hasattr(layer.attention, "log_rate"):
            rate = layer.attention.log_rate
            rate.set_value(rate[...] - 4)
    return model


@pytest.mark.parametrize("kind", ["linear", "delta"])
def test_what_prompts_leave(kind):
    """Logits after prompts, and after one more token, are those of whole passes, and
    what that token leaves is what longer prompts do. Over seq 4 a shard has 16 tokens:
    one row ends with one, and the last tokens of another are of two."""
    size = dataclasses.replace(PURE, num_layers=2, pattern=(kind,))
    near = dict(rtol=0, atol=3e-5)
    with mesh_of(dict(data=2, seq=4)):
        model = long_memories(size)
        module, values = unbind(model)
        tokens = np.random.default_rng(0).integers(0, 32, (4, 64)).astype(np.int32)
        lengths, of = np.asarray([17, 16, 1, 40], np.int32), np.arange(4)
        prompts = 64, None, values, tokens
        whole = np.asarray(model(tokens))
        logits, cache = read_prompt(module, *prompts, lengths, {})
        np.testing.assert_allclose(logits, whole[of, lengths - 1], **near)
        new = tokens[of, lengths]
        logits, cache = read_token(module, None, values, cache, new, lengths, {})
        np.testing.assert_allclose(logits, whole[of, lengths], **near)
        _, longer = read_prompt(module, *prompts, lengths + 1, {})
        for got, want in zip(*map(jax.tree.leaves, (cache, longer)), strict=True):
            np.testing.assert_allclose(got, want, **near)


def test_a_convolution_wider_than_a_shard():
    """Of 64 tokens over seq 8 each has 8; it reaches over 11."""
    size = dataclasses.replace(
        PURE, num_layers=1, pattern=("delta",), convolution_tokens=12
    )
    want = generate(made(size), PROMPTS, max_tokens=1)
    with mesh_of(dict(seq=8)):
        assert generate(made(size), PROMPTS, max_tokens=1) == want


def test_bytes_of_a_context_memory():
    """It is of the layers of kind full; a model without one is refused."""
    with mesh_of(dict(data=2, seq=2, tensor=2)):
        prompt, _ = traced(made(HYBRID), 64, 128, rows=4, context=CONTEXT)
        its = [each for each in prompt.out_info[1] if isinstance(each, Remembered)]
        arrays = [x for each in its for x in (each.sums, each.blocks)]
        held = sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in arrays
        )
        assert remembered_bytes(complete_model(HYBRID), CONTEXT, 4, 128) == held
    request, model = Request(max_tokens=2, context=CONTEXT), complete_model(PURE)
    with pytest.raises(ValueError, match="has none, but delta, linear: leave it out"):
        check_request(request, PROMPTS, model)
    check_request(dataclasses.replace(request, context=None), PROMPTS, model)


@pytest.mark.slow
def test_beside_a_context_memory(alone):
    """Of the layers that attend; what it reads is all that there is."""
    with mesh_of(dict(seq=2, tensor=2)):
        options = dict(max_tokens=NEW, cache_tokens=64, context=CONTEXT)
        assert generate(made(HYBRID), PROMPTS, **options) == alone["HYBRID"]


@pytest.mark.slow
def test_in_bfloat16():
    """Logits after a prompt, and of the token after it, are as near to those in float32
    as a whole row's are."""
    rows = np.random.default_rng(0).integers(0, 32, (2, 64)).astype(np.int32)
    size = dataclasses.replace(HYBRID, compute_dtype="bfloat16")
    lengths = np.full(2, 41, np.int32)
    with mesh_of(dict(seq=4)):
        exact, whole = (
            np.asarray(made(each)(rows))[:, 40:42].astype(np.float32)
            for each in (HYBRID, size)
        )
        model = made(size)
        (module, values), full = unbind(model), complete_model(size)
        everywhere = np.broadcast_to(np.arange(64), rows.shape)
        angles = turned(full, everywhere, lengths)
        first, cache = read_prompt(module, 64, None, values, rows, lengths, angles)
        angles = turned(full, lengths[:, None], lengths + 1)
        new = rows[:, 41]
        second, _ = read_token(module, None, values, cache, new, lengths, angles)
    got = np.stack((first, second), axis=1)
    off, off_whole = (np.abs(x - exact).max((0, 2)) for x in (got, whole))
    assert (off < 1.5 * off_whole).all()


def test_heads_that_do_not_divide_over_tensor():
    size = dataclasses.replace(HYBRID, delta_heads=6, delta_key_heads=3)
    abstract = nnx.eval_shape(lambda: Transformer(size, rngs=nnx.Rngs(0)))
    message = "mesh.tensor 2 does not divide model.delta_key_heads 3: use mesh.tensor 1"
    with mesh_of(dict(tensor=2)), pytest.raises(ValueError, match=message):
        generate(abstract, PROMPTS)
