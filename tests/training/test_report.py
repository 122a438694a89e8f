"""What a run says of itself before it starts."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from run_cases import make_config

from ulysses_jax.training.report import (
    _kinds,
    _memory,
    _work,
    attention_of,
    describe_own,
)


def dot_product_attention_fwd(q):
    """Under the name of cuDNN's primitive, which is not traced without its library."""
    return q + 1


def flash_attention_sm90(q):
    """Likewise, of tokamax's kernel."""
    return q + 1


@pytest.mark.parametrize(
    "chosen, platform, runs, name",
    [
        ("auto", "gpu", dot_product_attention_fwd, "cudnn"),
        ("auto", "gpu", flash_attention_sm90, "mosaic"),
        ("auto", "gpu", jnp.sin, "blockwise"),
        ("auto", "cpu", jnp.sin, "blockwise"),
        ("reference", "cpu", jnp.sin, "reference"),
    ],
)
def test_the_attention_is_the_program_s_own(chosen, platform, runs, name):
    config = make_config({}, model=dict(attention=chosen))
    step = jax.jit(lambda q: jax.jit(runs)(q) * 2).trace(jnp.ones(2))
    assert attention_of(config, platform, step) == name


def test_padding_of_a_module_of_the_user_s_is_said():
    state: Any = SimpleNamespace(parameters={"w": jnp.ones(3)}, frozen={})
    config = make_config(dict(seq=4), sequence_tokens=30)
    assert describe_own(config, state, "Mine")[2:] == [
        "30 tokens do not divide over ring 1 x seq 4: each sequence is padded with 2 "
        "masked tokens"
    ]
    assert len(describe_own(make_config(dict(seq=4)), state, "Mine")) == 2


def test_the_optimizer_is_said_by_its_name():
    said = _work(make_config(dict(seq=4), optimizer="muon"))
    assert said == "8 x 32 tokens a step of muon; mesh seq=4"


def test_memory_options_are_said_by_their_names():
    assert _memory(make_config({})) == ("remat full; loss_tile_tokens 6; zero_stage 3")
    memory = dict(
        remat="attention",
        offload=("inputs", "optimizer"),
        offload_fraction=0.5,
        mlp_tile_tokens=2048,
        loss_tile_tokens=1024,
    )
    assert _memory(make_config({}, memory=memory, zero_stage=1)) == (
        "remat attention; offload inputs, optimizer (0.5 of inputs); "
        "mlp_tile_tokens 2,048; loss_tile_tokens 1,024; zero_stage 1"
    )


@pytest.mark.parametrize(
    "model, said",
    [
        ({}, ""),
        (dict(window=2000), ", in layers window (of 2,000 tokens)"),
        (
            dict(pattern=["window"] * 5 + ["full"], window=4, num_layers=8),
            ", in layers 5 window, full (of 4 tokens)",
        ),
        (dict(pattern=["full", "mine"]), ", in layers full, mine"),
    ],
    ids=str,
)
def test_a_pattern_is_said_where_it_is_not_full_alone(model, said):
    assert _kinds(make_config({}, model=model).model) == said
