"""Runs of several lengths: a split of the mesh and a program for each, one state."""

import contextlib
import dataclasses
import functools
import io
import math
import os
import re
import shutil
import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import yaml
from flax import nnx
from jax.sharding import AxisType
from shared_programs import shared_programs as shared_programs
from slow import slow_but_for

from ulysses_jax import config as configs
from ulysses_jax import make_mesh, placement, train
from ulysses_jax.complete import complete
from ulysses_jax.config_file import from_dict, load
from ulysses_jax.data.open import open_data
from ulysses_jax.models.transformer import Transformer
from ulysses_jax.parallel.zigzag import zigzag_order
from ulysses_jax.training import load_run, loop
from ulysses_jax.training.by_length import (
    Steps,
    configs_by_length,
    refuse_moves,
    relaid,
    splits_of,
)
from ulysses_jax.training.loss import IGNORED
from ulysses_jax.training.metrics import RunLog, read_rows
from ulysses_jax.training.proof import read_commit
from ulysses_jax.training.state import init_state

LENGTHS = (8, 16, 32)
TOKENS = 4 * 32
V = 24


def complete_config(lengths=LENGTHS, **sections):
    values = dict(
        model=dict(
            vocab_size=V, width=16, num_layers=2, num_heads=8, compute_dtype="float32"
        ),
        data=dict(lengths=list(lengths)),
        training=dict(
            num_steps=6,
            warmup_steps=1,
            learning_rate=0.01,
            batch_size=TOKENS // max(lengths),
            sequence_tokens=max(lengths),
        ),
        memory=dict(loss_tile_tokens=6),
    )
    for name, fields in sections.items():
        values[name] = values.get(name, {}) | dict(fields)
    return complete(from_dict(configs.Config, values), name="test")


def placed_on(degrees, config):
    degrees = dict.fromkeys(("data", "fsdp", "ring", "seq", "tensor"), 1) | degrees
    placed = placement.place(config, degrees)
    return configs_by_length(config, placed, placement.place)


def meshes(degrees, **options):
    """(fsdp, ring, seq) of each length."""
    found = placed_on(degrees, complete_config(**options))
    return {n: (c.mesh.fsdp, c.mesh.ring, c.mesh.seq) for n, c in found.items()}


ONE_ROW = dict(training=dict(batch_size=1))
IN_TWO_PARTS = dict(training=dict(accumulation_steps=2))


@pytest.mark.parametrize(
    "degrees, options, expected",
    [
        (dict(data=2, seq=4), {}, [(4, 1, 1), (4, 1, 1), (1, 1, 4)]),
        (dict(data=4, seq=2), {}, [(2, 1, 1), (2, 1, 1), (1, 1, 2)]),
        (dict(seq=8), ONE_ROW, [(4, 1, 2), (2, 1, 4), (1, 1, 8)]),
        (
            dict(fsdp=2, ring=2, seq=2),
            dict(training=dict(batch_size=2)),
            [(8, 1, 1), (4, 1, 2), (2, 2, 2)],
        ),
        # As many rows a group in each of two parts.
        (
            dict(data=2, seq=4),
            IN_TWO_PARTS,
            [(4, 1, 1), (2, 1, 2), (1, 1, 4)],
        ),
        (
            dict(data=2, seq=4),
            dict(training=dict(accumulation_steps=None)),
            [(4, 1, 1), (2, 1, 2), (1, 1, 4)],
        ),
    ],
    ids=str,
)
def test_short_rows_take_fewer_devices_each(degrees, options, expected):
    assert list(meshes(degrees, **options).values()) == expected


def test_every_length_has_the_same_tokens_and_devices():
    config = complete_config(training=dict(accumulation_steps=2))
    for length, each in placed_on(dict(data=2, seq=4), config).items():
        training = each.training
        assert training.sequence_tokens == length == each.padded_tokens()
        assert training.batch_size * length == TOKENS
        assert training.accumulation_steps == 2
        assert np.prod(list(vars(each.mesh).values())) == 8 and each.mesh.data == 2
        assert not each.data.mask_documents


@pytest.mark.parametrize(
    "degrees, options, message",
    [
        (
            dict(data=4, seq=3),
            dict(model=dict(num_heads=6, head_size=4)),
            "data.lengths 8 does not divide over mesh.ring 1 x mesh.seq 3 .*: use deg",
        ),
        (
            dict(ring=8),
            dict(model=dict(strategy="ring")),
            "data.lengths 8: strategy ring spreads tokens over ring alone, above 1, .*"
            "or strategy ulysses",
        ),
        (
            dict(data=4, seq=2),
            dict(model=dict(sparse="strided", sparse_block_tokens=16)),
            "data.lengths 8: model.sparse_block_tokens 16 does not divide the 8 tokens",
        ),
    ],
    ids=str,
)
def test_a_length_that_the_mesh_cannot_split(degrees, options, message):
    with pytest.raises(ValueError, match=message):
        meshes(degrees, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(data=dict(lengths=[12, 32])), "data.lengths .12, 32. are not rising pow"),
        (dict(data=dict(lengths=[32, 16])), "are not rising powers of 2: use some"),
        (
            dict(data=dict(lengths=[8, 16])),
            "end with 16, and training.sequence_tokens is 32: .* set "
            "training.sequence_tokens 16 and training.batch_size 8",
        ),
        (dict(data=dict(packing="whole")), "data.packing whole puts several doc"),
        (dict(data=dict(balance=True)), "leave data.balance out"),
        (
            dict(data=dict(mixture=["a", "b"], weights=[1, 1])),
            "data.mixture draws rows by corpus, .* give data.files one folder",
        ),
        (
            dict(data=dict(lengths=[], curriculum="uniform")),
            "data.curriculum uniform is of data.lengths, and there are none",
        ),
        (dict(data=dict(lengths=[], cycle_steps=3)), "data.cycle_steps 3 is of data.l"),
        (dict(data=dict(cycle_steps=0)), "data.cycle_steps must be positive"),
    ],
    ids=str,
)
def test_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        complete_config(**options)


# ---- The step of each length, beside one on one device.


@functools.cache
def mesh_of(**degrees):
    num = math.prod(degrees.values())
    devices = jax.devices()[:num]
    return make_mesh(**degrees, devices=devices, axis_type=AxisType.Explicit)


@functools.cache
def on(degrees, options):
    """The config, its splits and its steps, on a mesh."""
    config, mesh = complete_config(**dict(options)), mesh_of(**dict(degrees))
    splits = splits_of(placed_on(dict(mesh.shape), config), mesh)
    return splits, Steps(splits, Transformer)


def batch_of(length, split):
    """Random rows, some of whose tokens have no label."""
    random = np.random.default_rng(length)
    shape = split.layout().shape
    tokens = random.integers(0, V, (TOKENS // length, length + 1))
    labels = np.where(
        random.random((TOKENS // length, length)) < 0.3, IGNORED, tokens[:, 1:]
    )
    labels[0] = IGNORED
    arrays = dict(
        tokens=tokens[:, :-1],
        labels=labels,
        positions=np.broadcast_to(np.arange(length), labels.shape),
    )
    order = zigzag_order(length, split.config.zigzag_members())
    return {
        name: jax.device_put(
            values[:, order].reshape(shape).astype(np.int32), split.layout().sharding
        )
        for name, values in arrays.items()
    }


@functools.cache
def first_state():
    """Made on one device; parameters grown until the layers matter."""
    splits, _ = on((("data", 1),), ())
    config, mesh = splits[32]
    with jax.set_mesh(mesh):
        state = jax.jit(functools.partial(init_state, config))()
    grown = jax.tree.map(
        lambda x: np.asarray(x) * (4 if x.ndim > 1 else 1), state.parameters
    )
    return jax.tree.map(np.asarray, dataclasses.replace(state, parameters=grown))


def pointers(state):
    return [
        (shard.device.id, shard.data.unsafe_buffer_pointer())
        for x in jax.tree.leaves(state)
        for shard in x.addressable_shards
    ]


def one_step(degrees, length, options=()):
    """The loss and the first moments, which are a tenth of the clipped gradients."""
    splits, steps = on(tuple(degrees.items()), options)
    state = relaid(first_state(), steps.shapes[max(splits)])
    batch = batch_of(length, splits[length])
    state, metrics = steps(state, batch, lambda _: None)
    numbers = {name: float(value) for name, value in metrics.items()}
    return numbers, jax.tree.map(np.asarray, state.optimizer[1][0].mu), state


SPLITS = {
    "data 2, seq 4": (dict(data=2, seq=4), ()),
    "fsdp 2, ring 2, seq 2": (dict(fsdp=2, ring=2, seq=2), ()),
    "seq 4, tensor 2, in two parts": (
        dict(seq=4, tensor=2),
        (("training", (("accumulation_steps", 2),)),),
    ),
}


@pytest.mark.parametrize(
    "name, length",
    slow_but_for(
        [("data 2, seq 4", 8), ("fsdp 2, ring 2, seq 2", 16)],
        SPLITS,
        LENGTHS,
    ),
)
def test_a_step_is_the_unsharded_one(name, length):
    degrees, options = SPLITS[name]
    got, got_moments, _ = one_step(degrees, length, options)
    want, want_moments, _ = one_step(dict(data=1), length)
    assert want["gradient_norm"] > 1.2  # clipped to 1
    np.testing.assert_allclose(got["loss"], want["loss"], rtol=2e-6)
    np.testing.assert_allclose(got["gradient_norm"], want["gradient_norm"], rtol=2e-6)
    for x, y in zip(*map(jax.tree.leaves, (got_moments, want_moments)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-8)
    norm = math.sqrt(sum((x**2).sum() for x in jax.tree.leaves(want_moments)))
    np.testing.assert_allclose(norm, 0.1, rtol=1e-5)


def test_the_state_stays_where_it_is():
    splits, steps = on((("data", 2), ("seq", 4)), ())
    meshes = {tuple(split.mesh.shape.values()) for split in splits.values()}
    assert len(meshes) == 2
    state = relaid(first_state(), steps.shapes[32])
    before = pointers(state)
    for length in (*LENGTHS, 8, 32):
        state = relaid(state, steps.shapes[length])
        assert pointers(state) == before
        for x in jax.tree.leaves(state):
            assert x.sharding.mesh == splits[length].mesh


@pytest.mark.parametrize(
    "degrees, options, message",
    [
        (
            dict(data=2, seq=4),
            dict(model=dict(width=18, head_size=4)) | IN_TWO_PARTS,
            "data.lengths 16 on mesh data=2 x fsdp=2 x seq=2 and 32 on data=2 x seq=4 "
            "have state.*in different places, .* 4 devices, divide model.width",
        ),
        (
            dict(data=2, seq=4),
            dict(model=dict(strategy="megatron")),
            "data.lengths 8: strategy megatron spreads tokens over seq alone, above 1",
        ),
    ],
    ids=str,
)
def test_parameters_that_would_be_moved_are_refused(degrees, options, message):
    mesh, config = mesh_of(**degrees), complete_config(**options)
    with pytest.raises(ValueError, match=message):
        splits = splits_of(placed_on(dict(mesh.shape), config), mesh)
        refuse_moves(splits, Transformer)


# ---- A run.

CONFIG = {
    "run": {"simulated_cpu_devices": 8, "seed": 3},
    "model": {
        "vocab_size": 264,
        "width": 16,
        "num_layers": 1,
        "num_heads": 4,
        "compute_dtype": "float32",
    },
    "training": {
        "num_steps": 9,
        "batch_size": 4,
        "sequence_tokens": 64,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "validation_interval_steps": 4,
        "validation_batches": 1,
    },
    "mesh": {"data": 2, "seq": 4},
    "quiet": True,
}
DATA = {"lengths": [8, 16, 64], "cycle_steps": 6, "validation_fraction": 0.1}


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lengths")
    random = np.random.default_rng(0)
    (folder / "in").mkdir()
    for i, size in enumerate(random.integers(9, 200, 40)):
        text = random.integers(97, 105, size).astype(np.uint8).tobytes()
        (folder / "in" / f"{i}.txt").write_bytes(text + b"\n")
    values = CONFIG | {"data": DATA | {"files": str(folder / "in")}}
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def start(config_file, folder, *overrides):
    train.main(["--config", str(config_file), "--run.folder", str(folder), *overrides])


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, config_file):
    folder = tmp_path_factory.mktemp("whole") / "run"
    compiled, unlike, saved_bytes = [], [], []
    lower, phases = jax.stages.Traced.lower, loop.Phases

    def counted(self, *args, **options):
        compiled.append(self.fun_name)
        return lower(self, *args, **options)

    def watched(*args, **options):
        saved_bytes.append(options["saved_bytes"])
        return phases(*args, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(jax.stages.Traced, "lower", counted)
        patched.setattr(loop, "Phases", watched)
        patched.setattr(phases, "unlike", lambda _, step: unlike.append(step))
        patched.setattr(RunLog, "say", lambda self, text: print(text))
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            start(config_file, folder)
    return SimpleNamespace(
        folder=folder,
        said=said.getvalue(),
        compiled=compiled,
        unlike=unlike,
        saved_bytes=saved_bytes,
    )


def drawn(config_file, num):
    order = open_data(load(config_file)).by_length.sampler
    return [order.at(step).length for step in range(num)]


def rows_in(folder):
    return read_rows(folder / "metrics.jsonl")


def test_each_row_names_its_length(config_file, whole_run):
    rows = rows_in(whole_run.folder)
    lengths = drawn(config_file, 9)
    assert [row["sequence_tokens"] for row in rows] == lengths
    assert set(lengths) == {8, 16, 64}
    assert [row["step"] for row in rows if "validation_loss" in row] == [4, 8, 9]
    for row in rows:
        np.testing.assert_allclose(row["tokens_per_second"] * row["seconds"], 256)
    assert rows[-1]["validation_loss"] < rows[3]["validation_loss"] - 0.1


def test_one_step_a_length_is_compiled(config_file, whole_run):
    said = whole_run.said
    assert whole_run.compiled.count("step") == 3
    found = re.findall(r"compiled the step of (\d+) tokens", said)
    # The longest first, for what does not fit; the others when they are met.
    met = dict.fromkeys([64, *drawn(config_file, 9)])
    assert [int(each) for each in found] == list(met)
    assert "steps of 8 tokens: 32 rows, mesh data=2 x fsdp=4\n" in said
    assert "steps of 64 tokens: 4 rows, mesh data=2 x seq=4; strategy ulysses" in said


def test_what_may_take_long_is_no_hang(config_file, whole_run):
    """The first step of each length, and a save of so many bytes."""
    lengths = drawn(config_file, 9)
    assert whole_run.unlike == sorted(lengths.index(each) + 1 for each in {*lengths})
    saved, *_ = (whole_run.folder / "checkpoints").iterdir()
    arrays = read_commit(saved)["arrays"].values()
    size = sum(math.prod(s) * np.dtype(d).itemsize for d, s in arrays)
    assert whole_run.saved_bytes == [size]


@pytest.mark.slow
def test_resumed_inside_a_cycle_it_is_the_same_to_the_bit(
    config_file, whole_run, tmp_path, monkeypatch, capfd
):
    log_step = RunLog.log_step

    def tell(self, step, *args, **numbers):
        if step == 3:  # step 4 is under way then
            os.kill(os.getpid(), signal.SIGTERM)
        log_step(self, step, *args, **numbers)

    def stopped(folder):
        with monkeypatch.context() as patched:
            patched.setattr(RunLog, "log_step", tell)
            with pytest.raises(SystemExit):
                start(config_file, folder)
        assert rows_in(folder)[-1]["step"] == 4

    stopped(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    start(config_file, tmp_path / "a")
    assert "resuming after step 4 of 9" in capfd.readouterr().out
    want, names = (
        rows_in(whole_run.folder),
        ("loss", "gradient_norm", "sequence_tokens"),
    )
    got = rows_in(tmp_path / "a")
    assert [[row[n] for n in names] for row in got] == [
        [row[n] for n in names] for row in want
    ]
    whole, again = (
        nnx.to_pure_dict(nnx.state(load_run(folder)))
        for folder in (whole_run.folder, tmp_path / "a")
    )
    jax.tree.map(np.testing.assert_array_equal, again, whole)

    # On another mesh: the same batches, rounded in another order.
    start(config_file, tmp_path / "b", "--mesh.data=1", "--mesh.fsdp=4", "--mesh.seq=2")
    got = rows_in(tmp_path / "b")
    assert [row["sequence_tokens"] for row in got] == drawn(config_file, 9)
    np.testing.assert_allclose(
        [row["loss"] for row in got], [row["loss"] for row in want], rtol=1e-5
    )
    np.testing.assert_allclose(
        got[-1]["validation_loss"], want[-1]["validation_loss"], rtol=1e-5
    )


def test_other_lengths_are_not_resumed(config_file, whole_run, capfd):
    for change, message in (
        (["--data.curriculum=uniform"], "data.curriculum was grow-p2, is uniform"),
        (["--data.cycle-steps=5"], "data.cycle_steps was 6, is 5"),
        (["--data.lengths", "16", "64"], "data.lengths was .8, 16, 64., is .16, 64."),
        (["--data.lengths", "--data.cycle-steps=null"], "data.lengths was .*is absent"),
    ):
        with pytest.raises(SystemExit):
            start(config_file, whole_run.folder, *change)
        assert re.search(message, capfd.readouterr().err)


@pytest.mark.slow
def test_a_stage_may_have_lengths(config_file, tmp_path, capfd):
    values = yaml.safe_load(config_file.read_text())
    values["data"] |= {"cycle_steps": None}
    values["training"] |= {"num_steps": 2, "validation_batches": 0}
    values["stages"] = [
        {"data": {"lengths": []}},
        {"data": {"lengths": [16, 64]}},
    ]
    path = tmp_path / "stages.yaml"
    path.write_text(yaml.safe_dump(values))
    start(path, tmp_path / "run")
    assert "sequence_tokens" not in rows_in(tmp_path / "run" / "stage_1")[0]
    assert "sequence_tokens" in rows_in(tmp_path / "run" / "stage_2")[0]
    values["stages"][1]["data"]["lengths"] = [12, 64]
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(SystemExit):
        start(path, tmp_path / "again")
    assert "stage 2 of 2: data.lengths (12, 64) are not" in capfd.readouterr().err
    assert not (tmp_path / "again").exists()
