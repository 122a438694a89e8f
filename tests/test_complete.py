"""A config filled in and checked by itself: what follows, and what is refused."""

import dataclasses

import pytest

from ulysses_jax import make_mesh
from ulysses_jax.complete import complete, complete_model
from ulysses_jax.config import Config, Data, Memory, Mesh, Model, Rope, Training


def small(**fields):
    return Model(**dict(vocab_size=320, width=128, num_layers=2, num_heads=4) | fields)


def test_a_model_is_filled_in_without_a_run():
    model = complete_model(small())
    filled = dict(num_kv_heads=4, head_size=32, feed_forward_width=512)
    filled |= dict(pattern=("full",), attention_biases="none")
    assert model == dataclasses.replace(small(), **filled)
    assert complete_model(model) == model
    given = dict(num_kv_heads=2, head_size=64, feed_forward_width=100)
    given |= dict(attention_biases="inputs")
    given |= dict(pattern=("window", "mine"), window=7)
    assert complete_model(small(**given)) == small(**given)


def test_learned_positions_need_a_table_s_rows():
    """Of a run they follow from its tokens; rotary ones have none."""
    learned = small(positions="learned")
    with pytest.raises(ValueError, match="learned is a table of model.max_positions"):
        complete_model(learned)
    rows = complete_model(dataclasses.replace(learned, max_positions=64))
    assert rows.max_positions == 64 and complete_model(rows) == rows
    assert complete_model(small(max_positions=64)).max_positions is None
    run = Config(model=learned, training=Training(sequence_tokens=96))
    assert complete(run, name="x").model.max_positions == 96
    with pytest.raises(ValueError, match="max_positions 64 is less than .* 96: raise"):
        complete(dataclasses.replace(run, model=rows), name="x")


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(width=-1), "model.width must be positive, not -1"),
        (dict(num_layers=0), "model.num_layers must be positive, not 0"),
        (dict(window=2**31), r"model.window must be below 2\^31"),
        (
            dict(rope=Rope(base=float("nan"))),
            "model.rope.base must be positive, not nan",
        ),
        (dict(num_heads="4"), "model.num_heads must be int, not '4'"),
        (dict(num_layers=True), "model.num_layers must be int, not True"),
        (dict(num_kv_heads=1.0), "model.num_kv_heads must be int or null, not 1.0"),
        (
            dict(norm="rmsnorm"),
            "model.norm must be 'rms' | .* | 'layer', not 'rmsnorm'",
        ),
        (dict(compute_dtype="float16"), "'bfloat16' | 'float32', not 'float16'"),
        (dict(biases="no"), "model.biases must be true or false, not 'no'"),
        (dict(pattern="window"), "model.pattern must be a list or null, not 'window'"),
        (dict(pattern=("full", 1)), "model.pattern must be str, not 1"),
        (dict(pattern=()), "model.pattern is empty: name the kinds of layers"),
        (
            dict(pattern=["full"] * 3),
            "pattern names 3 kinds of layers, but model.num_layers is 2: use at least 3"
            " layers, or a pattern of at most 2",
        ),
        (
            dict(pattern=("full", "window")),
            "pattern full, window has layers of kind window, but model.window does not",
        ),
        (
            dict(pattern=("full", "mine"), window=64),
            "window 64 is of layers of kind window, but model.pattern full, mine has",
        ),
        (
            dict(pattern=("windows", "full"), window=8),
            r"windows, full has none \(windows is no kind of this library's\): put",
        ),
        (dict(pattern=("delta",), window=8), "pattern delta has none: put window into"),
        (dict(strategy="ulises"), "'auto' or 'ulysses' | .*, not 'ulises'"),
        (dict(num_heads=3), "width 128 does not divide by model.num_heads 3"),
        (dict(num_kv_heads=3), r"3 does not divide .* 4: use one of \[1, 2, 4\]"),
        (dict(rope=Rope(factor=2.0)), "factor 2.0 stretches nothing while .* is none"),
        (dict(rope=Rope(scaling="linear", factor=0.5)), "would shrink a model"),
        (dict(rope=Rope(scaling="yarn", factor=2.0)), "yarn needs .*original_tokens"),
        (dict(rope=Rope(fraction=0.1)), "are 3 features, .* use 0.0625 for 2"),
        (dict(rope=Rope(fraction=1.5)), "model.rope.fraction must be at most 1"),
        (
            dict(rope=Rope(scaling="longrope", original_tokens=9, long_factors=(1.0,))),
            "short_factors are 0 numbers, .* give 16",
        ),
        (
            dict(
                rope=Rope(scaling="yarn", factor=2.0, original_tokens=9, beta_fast=1.0)
            ),
            "beta_slow 1.0 is not below model.rope.beta_fast 1.0",
        ),
        (dict(head_size=31), "head_size 31 is odd: RoPE turns pairs; use 32"),
    ],
    ids=str,
)
def test_a_model_that_cannot_be_is_refused_in_words(fields, message):
    with pytest.raises(ValueError, match=message.replace("' |", "' [|]")):
        complete_model(small(**fields))


@pytest.mark.parametrize(
    "fields, kinds, windows",
    [
        (dict(), ["full"] * 7, [None] * 7),
        (dict(window=9), ["window"] * 7, [9] * 7),
        (
            dict(pattern=["window", "window", "full"], window=9),
            ["window", "window", "full"] * 2 + ["window"],
            [9, 9, None] * 2 + [9],
        ),
        (dict(pattern=["full", "mine"]), ["full", "mine"] * 3 + ["full"], [None] * 7),
    ],
    ids=str,
)
def test_a_pattern_repeats_along_the_depth(fields, kinds, windows):
    """The last time it may be cut short; a user's own kinds are left alone."""
    model = complete_model(small(num_layers=7, **fields))
    assert model.kinds() == tuple(kinds)
    assert model.windows() == tuple(windows)
    assert complete_model(model) == model and hash(model)


def test_odd_heads_turn_no_pairs_under_learned_positions():
    model = complete_model(small(head_size=31, positions="learned", max_positions=8))
    assert model.head_size == 31


@pytest.mark.parametrize(
    "config, message",
    [
        ("configs/tiny.yaml", r"not the str 'configs/tiny.yaml': .*_file.load\(path"),
        ({"model": {}}, r"not the dict: ulysses_jax.config_file.from_dict\(Config, va"),
        (
            Config(mesh=make_mesh(data=2, seq=4)),  # pyright: ignore
            r"Config.mesh is a ulysses_jax.config.Mesh, not the jax.*Mesh: give "
            r"ulysses_jax.config.Mesh\(data=2, seq=4\)",
        ),
        (Config(model={}), "Config.model is a ulysses_jax.config.Model"),  # pyright: ignore
        (Config(training=8), "Config.training is .*, not the int 8"),  # pyright: ignore
    ],
    ids=["path", "dict", "mesh", "model", "number"],
)
def test_what_is_no_config(config, message):
    with pytest.raises(ValueError, match=message):
        complete(config, name="x")


def test_every_section_is_checked_as_a_file_s_is():
    """Made in Python, where nothing has read it yet."""
    with pytest.raises(ValueError, match="training.num_steps must be int, not '5'"):
        complete(Config(training=Training(num_steps="5")), name="x")  # pyright: ignore
    with pytest.raises(ValueError, match="zero_stage must be 1 . 2 . 3, not 3.0"):
        complete(Config(training=Training(zero_stage=3.0)), name="x")  # pyright: ignore
    offload = ["inputs"]
    run = Config(memory=Memory(offload=offload))  # pyright: ignore
    assert complete(run, name="x").memory.offload == ("inputs",)
    assert complete(complete(run, name="x"), name="y") == complete(run, name="x")


def test_rows_that_are_all_the_same_work_are_not_dealt():
    alike = Data(mask_documents=False, balance=True)
    with pytest.raises(ValueError, match="balance deals rows .* leave one of them out"):
        complete(Config(data=alike), name="test")
    placed = complete(
        Config(data=Data(balance=True), mesh=Mesh(data=2, fsdp=4)), name="test"
    )
    assert placed.balanced_groups() == 8
    assert dataclasses.replace(placed, data=Data()).balanced_groups() == 1
