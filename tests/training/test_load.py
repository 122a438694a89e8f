"""What a run left, read again: on any mesh the module that `train` returned."""

import shutil

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from slow import slow_but_for

from ulysses_jax import config as configs
from ulysses_jax import make_mesh
from ulysses_jax.config import Config, Data, Memory, Model, Run, Training
from ulysses_jax.training import load_run, train

DEGREES = dict(fsdp=8)
TOKENS = np.random.default_rng(0).integers(0, 264, (8, 16), np.int32)
MESHES = {
    "none": lambda: Mesh(np.empty((), object), ()),
    "auto": lambda: make_mesh(data=2, seq=4),
    "explicit": lambda: make_mesh(fsdp=4, seq=2, axis_type=AxisType.Explicit),
    "ring": lambda: make_mesh(ring=2, seq=2, tensor=2),
    "seq alone": lambda: Mesh(np.array(jax.devices()[:2]), ("seq",)),
}


def config_of(folder, degrees, memory=Memory(), **model):  # noqa: B008
    """Two steps on a text that lies beside the run's folder."""
    (folder / "text.txt").write_text("abc def\n" * 90)
    return Config(
        run=Run(folder=str(folder / "run")),
        model=Model(
            vocab_size=264, width=16, num_heads=4, compute_dtype="float32", **model
        ),
        data=Data(files=str(folder / "text.txt")),
        training=Training(
            num_steps=2,
            batch_size=8,
            sequence_tokens=16,
            learning_rate=0.1,
            warmup_steps=1,
            validation_batches=0,
        ),
        mesh=configs.Mesh(**degrees),
        memory=memory,
        quiet=True,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Of two kinds of layers and one left over: its folder, and the logits of what
    `train` returned."""
    folder = tmp_path_factory.mktemp("load")
    config = config_of(
        folder,
        DEGREES,
        Memory(remat="none"),
        num_layers=3,
        num_kv_heads=2,
        pattern=("window", "full"),
        window=5,
        attention="reference",
    )
    model = train(config)
    with jax.set_mesh(make_mesh(**DEGREES)):
        return folder / "run", np.asarray(model(TOKENS))


@pytest.mark.parametrize("mesh", slow_but_for(["none", "explicit"], MESHES))
def test_it_is_what_train_returned(run, mesh):
    folder, want = run
    with jax.set_mesh(MESHES[mesh]()):
        model = load_run(folder)
        assert [layer.kind for layer in (*model.layers, *model.rest)] == [
            "window",
            "full",
            "window",
        ]
        q = model.layers[0].attention.q[...]
        got = np.asarray(model(TOKENS))
    assert q.sharding.device_set == (
        {jax.devices()[0]} if mesh == "none" else set(MESHES[mesh]().devices.flat)
    )
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_each_device_has_its_shard_alone(run):
    with jax.set_mesh(make_mesh(fsdp=4, seq=2)):
        q = load_run(run[0]).layers[0].attention.q[...]
    assert q.shape == (1, 16, 4, 4)
    assert q.sharding.shard_shape(q.shape) == (1, 2, 4, 4)


def test_loaded_before_a_mesh_is_set(run):
    """It is laid on the mesh, as what was made before it is."""
    folder, want = run
    model = load_run(folder)
    with jax.set_mesh(MESHES["auto"]()):
        got = np.asarray(model(TOKENS))
        features = model.features(TOKENS)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())
    np.testing.assert_allclose(features @ model.head.T, want, rtol=0, atol=1e-4)


def test_what_cannot_be_loaded(run, tmp_path):
    folder, _ = run
    with pytest.raises(ValueError, match="is no run's folder: it has no config.yaml"):
        load_run(tmp_path)
    shutil.copy(folder / "config.yaml", tmp_path)
    with pytest.raises(ValueError, match="there is no checkpoint in .*checkpoints"):
        load_run(tmp_path)
    text = (folder / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("width: 16", "width: 32"))
    shutil.copytree(folder / "checkpoints", tmp_path / "checkpoints")
    with pytest.raises(ValueError, match="model.width was 16, is 32"):
        load_run(tmp_path)
    with (
        jax.set_mesh(make_mesh(tensor=8)),
        pytest.raises(ValueError, match="does not divide over tensor=8"),
    ):
        load_run(folder)


def test_what_train_returns_takes_the_sequence_s_order(tmp_path):
    """On a ring the run's own tokens lie in zigzag order; a caller's do not."""
    degrees = dict(data=2, ring=2, seq=2)
    model = train(config_of(tmp_path, degrees, num_layers=2))
    want = np.asarray(load_run(tmp_path / "run")(TOKENS))
    with jax.set_mesh(make_mesh(**degrees)):
        got = np.asarray(model(TOKENS))
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())
