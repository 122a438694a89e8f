"""AdamW by hand in float64: decay, clipping, the learning rate."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from slow import slow_but_for

from ulysses_jax import config as configs
from ulysses_jax import make_mesh
from ulysses_jax.complete import complete
from ulysses_jax.config_file import from_dict
from ulysses_jax.models import Transformer
from ulysses_jax.training.model import decayed, matrices
from ulysses_jax.training.optimizer import (
    learning_rate_schedule,
    make_optimizer,
    rate_change,
    schedule_fields,
)
from ulysses_jax.training.state import abstract_state

GPT = dict(
    norm="layer",
    feed_forward="gelu",
    positions="learned",
    biases=True,
    sinks=True,
    width=16,
)
FAMILIES = {"llama": dict(width=16), "biased": dict(width=16, biases=True), "gpt": GPT}
TRAINING = configs.Training(
    num_steps=20,
    warmup_steps=4,
    learning_rate=0.02,
    final_learning_rate=0.002,
    weight_decay=0.3,
    beta1=0.8,
    beta2=0.9,
    clip_norm=1.5,
)


def config_of(family):
    values = dict(model=dict(num_layers=2, vocab_size=8, **FAMILIES[family]))
    return complete(from_dict(configs.Config, values), name="test")


def optimizer_of(family):
    config = config_of(family)
    of_model = decayed(config, Transformer), matrices(config, Transformer)
    return make_optimizer(TRAINING, *of_model)


@functools.cache
def parameters(family):
    """The names and shapes of a whole model, with values away from 0."""
    config = config_of(family)
    mesh = make_mesh(devices=jax.devices()[:1], axis_type=AxisType.Explicit)
    with jax.set_mesh(mesh):
        shapes = abstract_state(config).parameters
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(1 + rng.random(leaf.shape), jnp.float32), shapes
    )


def gradients_like(tree, seed, size):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(size * rng.standard_normal(leaf.shape), jnp.float32),
        tree,
    )


def by_name(tree):
    return {
        ".".join(str(key.key) for key in path): np.asarray(leaf, np.float64)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.parametrize("family", slow_but_for(["gpt"], FAMILIES))
def test_only_matrices_decay(family):
    """Without a gradient a matrix shrinks by rate x decay, once; the rest stays."""
    before = parameters(family)
    optimizer = optimizer_of(family)
    zeros = jax.tree.map(jnp.zeros_like, before)
    state = optimizer.init(before)
    _, state = optimizer.update(zeros, state, before)  # at step 0 the rate is 0
    updates, _ = optimizer.update(zeros, state, before)
    rate = 0.02 / 4
    shrunk = set()
    for name, update in by_name(updates).items():
        want = -rate * 0.3 * by_name(before)[name]
        if np.any(update):
            np.testing.assert_allclose(update, want, rtol=1e-6, err_msg=name)
            shrunk.add(name)
    matrices = {"embedding", "unembedding"}
    matrices |= {f"layers.0.attention.{name}" for name in ("q", "k", "v", "out")}
    matrices |= {f"layers.0.feed_forward.{name}" for name in ("up", "down")}
    matrices |= (
        {"position_table"} if family == "gpt" else {"layers.0.feed_forward.gate"}
    )
    assert shrunk == matrices
    kept = set(by_name(before)) - shrunk
    kinds = {name.split(".")[-1].split("_")[-1] for name in kept}
    assert kinds <= {"scale", "bias", "sinks"}
    biases = {"llama": 0, "biased": 7, "gpt": 9}[family]
    assert len(kept) == 3 + biases + ("sinks" in kinds)
    assert ("sinks" in kinds) == (family == "gpt")


def adamw(before, all_gradients):
    """Loshchilov and Hutter's algorithm 2, after clipping by the norm of all."""
    p = by_name(before)
    m = {name: 0 * values for name, values in p.items()}
    v = dict(m)
    for count, gradients in enumerate(map(by_name, all_gradients)):
        norm = math.sqrt(sum((g**2).sum() for g in gradients.values()))
        for name, g in gradients.items():
            g = g * min(1, 1.5 / norm)
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.9 * v[name] + 0.1 * g**2
            step = (m[name] / (1 - 0.8 ** (count + 1))) / (
                np.sqrt(v[name] / (1 - 0.9 ** (count + 1))) + 1e-8
            )
            decay = 0 if name.endswith(("scale", "bias")) else 0.3
            rate = 0.02 * count / 4
            p[name] = p[name] - rate * (step + decay * p[name])
    return p


def run(before, all_gradients):
    optimizer = optimizer_of("biased")
    state, p = optimizer.init(before), before
    update = jax.jit(optimizer.update)
    for gradients in all_gradients:
        updates, state = update(gradients, state, p)
        p = jax.tree.map(jnp.add, p, updates)
    return by_name(p)


def norm_of(tree):
    return math.sqrt(sum((g**2).sum() for g in by_name(tree).values()))


def test_adamw_with_clipping():
    """Some gradients are longer than the bound, some are not: they weigh apart."""
    before = parameters("biased")
    sizes = [1.0, 0.002, 3.0, 0.01]
    all_gradients = [gradients_like(before, i, size) for i, size in enumerate(sizes)]
    norms = [norm_of(gradients) for gradients in all_gradients]
    assert [norm > 1.5 for norm in norms] == [True, False, True, False]
    got = run(before, all_gradients)
    for name, want in adamw(before, all_gradients).items():
        np.testing.assert_allclose(got[name], want, rtol=1e-5, err_msg=name)


def test_clips_by_the_norm_of_all_not_of_each():
    before = parameters("llama")
    optimizer = optimizer_of("llama")
    gradients = gradients_like(before, 0, 1.0)
    _, state = optimizer.update(gradients, optimizer.init(before), before)
    first_moment = by_name(state[1][0].mu)
    for name, g in by_name(gradients).items():
        want = 0.2 * g * 1.5 / norm_of(gradients)
        np.testing.assert_allclose(first_moment[name], want, rtol=1e-5, err_msg=name)


def rate_at(step, **changes):
    training = dataclasses.replace(TRAINING, **changes)
    return float(learning_rate_schedule(training)(step))


def test_schedule():
    """0, up in a line to the peak at warmup_steps, down a cosine to the final rate."""
    assert rate_at(0) == 0
    assert rate_at(1) == pytest.approx(0.005)
    assert rate_at(4) == pytest.approx(0.02)
    assert rate_at(12) == pytest.approx((0.02 + 0.002) / 2)  # half-way
    assert rate_at(16) == pytest.approx(0.002 + 0.018 * (1 - math.sqrt(0.5)) / 2)
    assert rate_at(20) == pytest.approx(0.002)
    assert rate_at(1000) == pytest.approx(0.002)


def changed(step, **changes):
    before, now = schedule_fields(TRAINING), dataclasses.replace(TRAINING, **changes)
    return rate_change(before, now, step, step)


def test_another_schedule_is_said_with_both_rates():
    """Of a run that is finished, and of one that stopped; and what holds the rate."""
    (line,) = changed(20, num_steps=100)
    last, rate = rate_at(19), rate_at(20, num_steps=100)
    assert rate > 8 * last
    assert line.startswith(
        f"the learning rate goes from {last:.3g} at step 20 to {rate:.3g} at step 21: "
        "training.num_steps was 20, is 100, and"
    )
    number = float(re.search(r"to go on at ([\d.e-]+), set", line)[1])
    held = dict(learning_rate=number, final_learning_rate=number, num_steps=100)
    for step in (20, 50, 99):
        assert rate_at(step, **held) == pytest.approx(last, rel=1e-2)
    assert len(changed(10, num_steps=100)) == 1
    (line,) = changed(10, learning_rate=0.04, warmup_steps=5)
    assert "warmup_steps was 4, is 5, training.learning_rate was 0.02, is 0.04" in line


def test_the_same_rate_is_not_spoken_of():
    assert changed(10) == changed(20) == []
    assert changed(2, num_steps=100) == []  # while it warms up
    assert changed(10, clip_norm=2.0) == []
    assert rate_change({}, TRAINING, 10, 10) == []  # of a checkpoint that does not say


def test_schedule_without_warmup_and_with_nothing_else():
    assert rate_at(0, warmup_steps=0) == pytest.approx(0.02)
    assert rate_at(20, warmup_steps=0) == pytest.approx(0.002)
    assert rate_at(19, warmup_steps=20) == pytest.approx(0.019)
    assert rate_at(20, warmup_steps=20) == pytest.approx(0.02)
