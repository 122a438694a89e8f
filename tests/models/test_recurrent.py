"""Layers whose tokens reach others by a state, in models of several kinds."""

import dataclasses
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from recurrences import DOCUMENTS, B, T, rule

from ulysses_jax import Model, train
from ulysses_jax.complete import complete, complete_model
from ulysses_jax.config import Config, Lora, Memory, Training
from ulysses_jax.config_file import load_from_command_line
from ulysses_jax.memory.auto import kept_bytes, rungs
from ulysses_jax.mesh import AXES
from ulysses_jax.models.delta import GatedDelta
from ulysses_jax.models.linear import LinearAttention
from ulysses_jax.placement import place
from ulysses_jax.plan.__main__ import main as plan

SIZE = Model(
    vocab_size=32,
    width=16,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_size=4,
    feed_forward_width=16,
    norm="zero_centered_rms",
    attention_gate=True,
    pattern=("delta", "linear", "full"),
    delta_heads=8,
    delta_key_size=3,
    delta_value_size=5,
    compute_dtype="float32",
)
KINDS = {"linear": LinearAttention, "delta": GatedDelta}


def drawn(kind):
    """A layer's part with drawn parameters, so that gates and taps say something."""
    module = KINDS[kind](SIZE, rngs=nnx.Rngs(0))
    graph, state = nnx.split(module)
    leaves, treedef = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [
        jax.random.normal(key, leaf.shape) * 0.5
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return nnx.merge(graph, jax.tree.unflatten(treedef, leaves))


def by_hand(kind, module, x):
    """The layer's part in float64, from its parameters."""
    w = {n: jnp.asarray(np.asarray(p[...], np.float64)) for n, p in parts(module)}
    silu, sigmoid = jax.nn.silu, jax.nn.sigmoid
    into = {
        name: jnp.tensordot(x, w[name], 1)
        for name in ("q", "k", "v", "gate", "beta", "decay")
        if name in w
    }
    q, k, v, gate = (into[name] for name in ("q", "k", "v", "gate"))
    if kind == "delta":
        q, k, v = (
            silu(rule("convolution", dict(x=y, weights=w[f"{n}_taps"]), DOCUMENTS))
            for n, y in (("q", q), ("k", k), ("v", v))
        )
        q, k = (y / jnp.sqrt((y * y).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
        step = jax.nn.softplus(into["decay"] + w["decay_bias"])
        given = dict(q=q, k=k, v=v, log_decay=-jnp.exp(w["log_rate"]) * step)
        given["beta"] = sigmoid(into["beta"])
        out, scale = rule("delta", given, DOCUMENTS, 3**-0.5), w["norm"]
        gate = silu(gate)
    else:
        rates = np.asarray([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])
        given = dict(q=silu(q), k=silu(k), v=v)
        given["log_decay"] = jnp.broadcast_to(-rates, (*x.shape[:2], 4))
        out, gate = rule("linear", given, DOCUMENTS, 0.5), sigmoid(gate)
        scale = 1 + w["norm"]
    out = out / jnp.sqrt((out * out).mean(-1, keepdims=True) + SIZE.norm_epsilon)
    return jnp.tensordot(out * scale * gate, w["out"], 2)


def parts(module):
    return [(n, p) for n, p in vars(module).items() if isinstance(p, nnx.Param)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_by_hand(kind):
    module = drawn(kind)
    x = jax.random.normal(jax.random.key(2), (B, T, SIZE.width))
    got = nnx.jit(lambda module, x: module(x, segment_ids=DOCUMENTS))(module, x)
    with jax.enable_x64(True):
        want = np.asarray(by_hand(kind, module, jnp.asarray(np.asarray(x, np.float64))))
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


HYBRID = "delta", "linear", "full"


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(zigzag=True), "leave model.zigzag out"),
        (dict(strategy="megatron"), "use model.strategy auto or ulysses"),
        (dict(lora=Lora()), "leave model.lora out"),
        (
            dict(pattern=("linear",)),
            "none of which has model.attention_gate: leave it out, or name full",
        ),
        (dict(convolution_tokens=0), "model.convolution_tokens must be positive"),
        (dict(delta_key_size=0), "model.delta_key_size must be positive"),
        (
            dict(delta_key_heads=3),
            r"delta_key_heads 3 does not divide model.delta_heads 8: use .* 2, 4, 8\]",
        ),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        complete_model(dataclasses.replace(SIZE, **changes))


def test_what_delta_layers_take_from_the_others():
    names = "delta_heads", "delta_key_heads", "delta_key_size", "delta_value_size"
    size = dataclasses.replace(SIZE, **dict.fromkeys(names))
    sizes = complete_model(size).state_sizes("delta")
    assert sizes == complete_model(size).state_sizes("linear") == (4, 2, 4, 4)
    assert complete_model(SIZE).state_sizes("delta") == (8, 2, 3, 5)


def test_heads_of_delta_layers_lie_over_tensor():
    size = dataclasses.replace(SIZE, delta_heads=6, delta_key_heads=3)
    with pytest.raises(ValueError, match="model.delta_key_heads 3 .* mesh.tensor 2"):
        placed(size, tensor=2)


DEGREES = dict.fromkeys(AXES, 1)


def placed(size, tokens=32, memory=None, **degrees):
    training = Training(sequence_tokens=tokens)
    config = Config(model=size, training=training, memory=memory or Memory())
    return place(complete(config, name="test"), DEGREES | degrees)


def test_a_hybrid_over_a_ring_lies_in_the_sequences_order():
    assert not placed(SIZE, ring=2, seq=2).model.zigzag
    full = dataclasses.replace(SIZE, pattern=("full",))
    assert placed(full, ring=2, seq=2).model.zigzag
    # Nor are keys gathered, where a shard's work would depend on its place.
    few = dict(num_kv_heads=1, num_heads=16)
    assert placed(dataclasses.replace(SIZE, **few), seq=2).model.strategy == "ulysses"
    full = dataclasses.replace(full, **few)
    assert placed(full, seq=2).model.strategy == "all_gather"


def test_memory_auto_takes_layers_of_a_state_in_pieces():
    """Keys wait on the host only of layers that attend; and over a ring only these
    refuse pieces."""
    for pattern, degrees, found in (
        (HYBRID, dict(seq=2), {"in pieces", "keys"}),
        (("linear",), dict(ring=2, seq=2), {"in pieces"}),
        (HYBRID, dict(ring=2, seq=2), set()),
    ):
        size = dataclasses.replace(
            SIZE, pattern=pattern, attention_gate="full" in pattern
        )
        memories = [rung for _, rung in rungs(placed(size, tokens=4096, **degrees))]
        got = {"in pieces" for each in memories if each.sequence_chunk_tokens}
        got |= {"keys" for each in memories if "keys" in each.offload}
        assert got == found


@pytest.mark.parametrize(
    "pattern, degrees, memory, message",
    [
        (HYBRID, dict(ring=2), dict(sequence_chunk_tokens=8), "cuts up the strategy"),
        (
            ("linear", "delta"),
            dict(ring=2),
            dict(sequence_chunk_tokens=8, offload=("keys",)),
            "pattern linear, delta has none: do not offload keys",
        ),
        (HYBRID, dict(seq=2), dict(sequence_chunk_tokens=2), "fewer: use 4"),
        (("linear", "delta"), dict(ring=2), dict(sequence_chunk_tokens=8), None),
        (HYBRID, dict(seq=2), dict(sequence_chunk_tokens=4, offload=("keys",)), None),
    ],
)
def test_pieces_at_the_config(pattern, degrees, memory, message):
    size = dataclasses.replace(SIZE, pattern=pattern, attention_gate="full" in pattern)
    refused = pytest.raises(ValueError, match=message) if message else nullcontext()
    with refused:
        placed(size, memory=Memory(**memory), **degrees)


@pytest.mark.parametrize(
    "remat, features", [("attention", 4 * 4), ("products", 2 * 4 * 4 + 2 * 8 * 5)]
)
def test_a_layer_of_states_keeps_no_output_of_attention(remat, features):
    """Of four layers one attends; products keeps what all give. 16 tokens a device,
    float32."""
    config = placed(SIZE, seq=2)
    training = dataclasses.replace(config.training, batch_size=1)
    memory = Memory(remat=remat, offload=("attention",))
    config = dataclasses.replace(config, training=training, memory=memory)
    assert kept_bytes(config)[1] == features * 16 * 4


def test_a_convolution_wider_than_a_shard():
    with pytest.raises(ValueError, match="sequences of 24 tokens or more"):
        placed(SIZE, tokens=16, seq=8)
    placed(SIZE, tokens=24, seq=8)
    placed(dataclasses.replace(SIZE, convolution_tokens=3), tokens=16, seq=8)


RUN = """
model: {vocab_size: 257, width: 32, num_layers: 3, num_heads: 4, num_kv_heads: 2}
training: {num_steps: 1, batch_size: 8, sequence_tokens: 64}
mesh: {fsdp: 8}
"""
HYBRID_OF = ("--model.pattern", *HYBRID)
LONG = ("--mesh.fsdp", "1", "--mesh.seq", "8", "--training.sequence-tokens")


@pytest.mark.parametrize("door", ["train", "plan"])
@pytest.mark.parametrize(
    "words, message, remedy",
    [
        (
            ("--model.pattern", "low_rank", "full", "full"),
            "'low_rank', whose mixtures have tokens of all places, and this model is "
            "causal: use 'linear' or 'delta', or",
            ("--model.pattern", *("linear", "full", "full")),
        ),
        (
            (*HYBRID_OF, "--model.num-kv-heads", "3"),
            "model.num_kv_heads 3 does not divide model.num_heads 4: use one of [1, 2",
            ("--model.num-kv-heads", "2"),
        ),
        (
            (*HYBRID_OF, "--model.delta-heads", "6", "--model.delta-key-heads", "3")
            + ("--mesh.fsdp", "4", "--mesh.tensor", "2"),
            "model.delta_key_heads 3 does not divide over mesh.tensor 2: use "
            "mesh.tensor 1, mesh.fsdp 8",
            ("--mesh.tensor", "1", "--mesh.fsdp", "8"),
        ),
        (
            (*HYBRID_OF, *LONG, "16"),
            "reach 3 tokens back, but a device has 2 of the 16 of a sequence",
            ("--model.convolution-tokens", "3"),
        ),
        (
            (*HYBRID_OF, *LONG, "16"),
            "use sequences of 24 tokens or more",
            ("--training.sequence-tokens", "24"),
        ),
    ],
    ids=["a kind that is none", "heads", "heads over tensor", "convolution", "tokens"],
)
def test_refused_at_both_doors(words, message, remedy, door, tmp_path, capfd):
    """In words, before there is a folder; the remedy is taken."""
    path, folder = tmp_path / "run.yaml", tmp_path / "run"
    path.write_text(RUN)
    given = ["--config", str(path), "--run.folder", str(folder), *words]
    with pytest.raises(SystemExit) as end:
        if door == "train":
            train.main(given)
        else:
            plan([*given, "--gpus", "h100:1x8"])
    assert end.value.code == 2 and not folder.exists()
    assert message in capfd.readouterr().err
    (config,) = load_from_command_line([*given, *remedy], program="test")
    degrees = dataclasses.asdict(config.mesh)
    place(config, DEGREES | {axis: n for axis, n in degrees.items() if n})
