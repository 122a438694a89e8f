"""The trainer from its command line: a run, its folder, resumption, every refusal."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml
from files import ROOT
from jax.sharding import AxisType, NamedSharding
from matplotlib.image import imread
from shared_programs import shared_programs as shared_programs

from ulysses_jax import train
from ulysses_jax.config_file import load
from ulysses_jax.data.corpus import find_documents
from ulysses_jax.data.prepare import prepare
from ulysses_jax.data.rows import Rows
from ulysses_jax.data.split import split
from ulysses_jax.data.stream import read_bytes
from ulysses_jax.mesh import make_mesh
from ulysses_jax.placement import place
from ulysses_jax.sharding import activation
from ulysses_jax.training import by_length, loop, run
from ulysses_jax.training.checkpoint import Checkpointer
from ulysses_jax.training.lock import RunLock
from ulysses_jax.training.metrics import RunLog, read_rows
from ulysses_jax.training.model import model_of
from ulysses_jax.training.state import abstract_state

CONFIG = {
    "run": {"simulated_cpu_devices": 8},
    "model": {
        "vocab_size": 264,
        "width": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "feed_forward_width": 48,
        "compute_dtype": "float32",
    },
    "training": {
        "num_steps": 6,
        "batch_size": 8,
        "sequence_tokens": 64,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "validation_interval_steps": 3,
        "validation_batches": 2,
        "checkpoint_interval_steps": 2,
    },
    "mesh": {"data": 2, "seq": 4},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Thirty documents of unequal length, some longer than a row, one not UTF-8; an
    empty one, which the run names, by a name that is not UTF-8 either."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for i in range(30):
        words = rng.choice(["alpha", "beta", "gamma", "delta\n"], rng.integers(4, 90))
        (folder / f"{i:02}.txt").write_text(" ".join(words))
    (folder / "latin1.txt").write_bytes("caf\xe9 \xff ".encode("latin-1") * 9)
    (folder / os.fsdecode(b"caf\xe9.txt")).touch()
    return folder


@pytest.fixture(scope="module")
def config_file(tmp_path_factory, corpus):
    path = tmp_path_factory.mktemp("configs") / "small.yaml"
    path.write_text(yaml.safe_dump(CONFIG | {"data": {"files": str(corpus)}}))
    return path


ORDER = []
"""What the whole run did: ("batch", n) was taken for step n, ("row", n) was logged."""


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, config_file):
    """Six steps without interruption on data=2 x seq=4; the folder it left."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    log_step, batches = RunLog.log_step, loop.training_batches

    def log(self, step, *args, **numbers):
        ORDER.append(("row", step))
        log_step(self, step, *args, **numbers)

    def taken(*args, **options):
        for number, batch in enumerate(batches(*args, **options), 1):
            ORDER.append(("batch", number))
            yield batch

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RunLog, "log_step", log)
        patched.setattr(loop, "training_batches", taken)
        start(config_file, folder)
    return folder


def start(config_file, folder, *overrides):
    train.main(["--config", str(config_file), "--run.folder", str(folder), *overrides])


def losses(folder):
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return np.array([row["loss"] for row in rows])


def validation_losses(folder):
    rows = read_rows(folder / "metrics.jsonl")
    return [row["validation_loss"] for row in rows if "validation_loss" in row]


def test_what_a_run_leaves_behind(whole_run, config_file, capfd):
    rows = read_rows(whole_run / "metrics.jsonl")
    assert len(rows) == 6
    assert all(
        {"step", "loss", "tokens_per_second", "seconds"} <= row.keys() for row in rows
    )
    assert [row["step"] for row in rows if "validation_loss" in row] == [3, 6]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    names = {path.name for path in whole_run.iterdir()}
    assert names == {
        "config.yaml",
        "metrics.jsonl",
        "events.jsonl",
        "checkpoints",
        "tensorboard",
        "loss.png",
    }
    assert imread(whole_run / "loss.png").shape[0] > 400
    assert sorted(p.name for p in (whole_run / "checkpoints").iterdir()) == ["4", "6"]
    resolved = load(whole_run / "config.yaml")
    assert resolved.model.head_size == 8 and resolved.run.folder == str(whole_run)
    # The resolved config is the run: it finds the checkpoint and has nothing to do.
    train.main(["--config", str(whole_run / "config.yaml")])
    said = capfd.readouterr().out
    assert "nothing left to do" in said
    assert "mesh data=2 x seq=4; strategy ulysses" in said
    assert "attention blockwise; memory remat full; loss_tile_tokens 1,024; " in said


def test_a_step_is_in_flight_while_one_is_logged(whole_run):
    """But where it is saved (2, 4, 6) or validated (3, 6): there its own row comes."""
    assert whole_run.exists()
    rows = {step: ORDER.index(("row", step)) for step in range(1, 7)}
    in_flight = {
        n: [e for e in ORDER[:at] if e[0] == "batch"] for n, at in rows.items()
    }
    assert {n: len(taken) - n for n, taken in in_flight.items()} == {
        1: 1,
        2: 0,
        3: 0,
        4: 0,
        5: 1,
        6: 0,
    }


def test_a_signal_saves_where_it_stops(
    whole_run, config_file, tmp_path, monkeypatch, capfd
):
    folder = tmp_path / "run"
    log_step = RunLog.log_step

    def kill(self, step, *args, **numbers):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        log_step(self, step, *args, **numbers)

    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "log_step", kill)
        with pytest.raises(SystemExit) as stopped:
            start(config_file, folder)
    assert stopped.value.code == 130
    said = capfd.readouterr().out
    assert "stopped at step 3; the same command goes on from there" in said
    assert imread(folder / "loss.png").shape[0] > 400
    start(config_file, folder)
    assert "resuming after step 3 of 6" in capfd.readouterr().out
    np.testing.assert_allclose(losses(folder), losses(whole_run), rtol=1e-6)


OFFLOADED = ("--memory.offload", "inputs", "optimizer", "parameters")


@pytest.mark.parametrize(
    "first, second",
    [
        pytest.param((), ("--mesh.data=8", "--mesh.seq=1"), marks=pytest.mark.slow),
        ((), ("--mesh.data=1", "--mesh.fsdp=2", "--mesh.seq=2", "--mesh.tensor=2")),
        pytest.param(OFFLOADED, OFFLOADED, marks=pytest.mark.slow),
        pytest.param(OFFLOADED, (), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_interrupted_and_resumed_on_another_mesh_or_from_other_memory(
    whole_run, config_file, tmp_path, monkeypatch, capfd, first, second
):
    folder = tmp_path / "run"
    log_step = RunLog.log_step

    def interrupt(self, step, *args, **numbers):
        if step == 4:  # as if it was killed
            raise KeyboardInterrupt
        log_step(self, step, *args, **numbers)

    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "log_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            start(config_file, folder, *first)
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["2"]

    start(config_file, folder, *second)
    assert "resuming after step 2 of 6" in capfd.readouterr().out
    np.testing.assert_allclose(losses(folder), losses(whole_run), rtol=1e-5)
    np.testing.assert_allclose(
        validation_losses(folder), validation_losses(whole_run), rtol=1e-5
    )


def test_validation_loss_and_speed_are_what_they_say(whole_run, config_file, corpus):
    """Against the files themselves and a loss written here: one sum over all tokens."""
    rows = read_rows(whole_run / "metrics.jsonl")
    for row in rows:
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(8 * 64)

    config = load(config_file)
    config = place(config, dict.fromkeys(("data", "fsdp", "ring", "seq", "tensor"), 1))
    documents, _ = find_documents(str(corpus))
    _, files = split(documents, config.data.validation_fraction)
    stream = [
        (byte, number)
        for number, file in enumerate(files)
        for byte in (*read_bytes(file, 0, file.size), 256)
    ]
    mesh = make_mesh(devices=jax.devices()[:1], axis_type=AxisType.Explicit)
    total = count = 0
    with jax.set_mesh(mesh):
        shapes = abstract_state(config)
        with Checkpointer(whole_run / "checkpoints", interval_steps=1) as saved:
            found = saved.restore(shapes)
        assert found is not None and found[0] == 6
        model = model_of(config, found[1].parameters)
        by_token = NamedSharding(mesh, activation("BT", mesh.shape))
        for start_of_row in range(0, len(stream), 64):
            row = stream[start_of_row : start_of_row + 64]
            after = [*stream[start_of_row + 1 : start_of_row + 65], (0, -1)]
            tokens, segments = np.array(row).T[:, None].astype(np.int32)
            starts = [0, *(np.flatnonzero(np.diff(segments[0])) + 1)]
            positions = np.concatenate(
                [np.arange(n) for n in np.diff([*starts, len(row)])]
            )
            arrays = (tokens, positions[None].astype(np.int32), segments)
            ids = [jax.device_put(array, by_token) for array in arrays]
            x = model.features(*ids)
            logits = np.asarray(x[0], np.float64) @ np.asarray(model.head, np.float64).T
            log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            for i, ((_, document), (label, same)) in enumerate(
                zip(row, after, strict=False)
            ):
                if document == same:
                    total, count = total - log_p[i, label], count + 1
    assert count == sum(file.size for file in files)
    assert validation_losses(whole_run)[-1] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(
    "override, measured",
    [
        pytest.param(
            "--training.validation-interval-steps=0", [2], marks=pytest.mark.slow
        ),
        pytest.param("--training.validation-batches=0", [], marks=pytest.mark.slow),
        ("--data.validation-fraction=0", []),
    ],
)
def test_validation_switched_off(config_file, tmp_path, override, measured):
    start(config_file, tmp_path / "run", "--training.num-steps=2", override)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in rows if "validation_loss" in r] == measured


@pytest.mark.slow
def test_quiet_and_null_reach_the_run(config_file, tmp_path, monkeypatch):
    quiet = []
    monkeypatch.setattr(
        run, "RunLog", lambda *a, **k: quiet.append(k["quiet"]) or RunLog(*a, **k)
    )
    one = ("--training.num-steps=1", "--training.accumulation-steps", "null")
    start(config_file, tmp_path / "a", *one, "--quiet")
    start(config_file, tmp_path / "b", *one, "--data.mask-documents", "false")
    assert not load(tmp_path / "b" / "config.yaml").data.mask_documents
    assert quiet == [True, False]
    # One sequence of each of two rows at a time.
    assert load(tmp_path / "a" / "config.yaml").training.accumulation_steps == 4


@pytest.mark.parametrize("where", ["file", "file/run"])
def test_a_folder_that_cannot_be(config_file, tmp_path, capfd, where):
    file, folder = tmp_path / "file", tmp_path / where
    file.write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        start(config_file, folder)
    said = capfd.readouterr()
    assert stopped.value.code == 2 and "compiled" not in said.out
    assert "run.folder" in said.err and "use another" in said.err
    assert file.read_text() == "mine"


@pytest.mark.slow
def test_a_length_that_does_not_divide_is_padded(config_file, tmp_path, capfd):
    short = ("--training.num-steps=3", "--training.sequence-tokens=63")
    start(config_file, tmp_path / "padded", *short)
    assert "padded with 1 masked token" in capfd.readouterr().out
    start(config_file, tmp_path / "whole", *short, "--mesh.data=8", "--mesh.seq=1")
    assert "padded" not in capfd.readouterr().out
    np.testing.assert_allclose(
        losses(tmp_path / "padded"), losses(tmp_path / "whole"), rtol=1e-5
    )


def test_a_broken_checkpoint_is_passed_over(whole_run, config_file, tmp_path, capfd):
    folder = Path(shutil.copytree(whole_run, tmp_path / "run"))
    files = [p for p in (folder / "checkpoints" / "6").rglob("*") if p.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-40] + b"\0" * 40)
    # Its own config.yaml names the folder that it was copied from.
    train.main(["--config", str(folder / "config.yaml")])
    said = capfd.readouterr().out
    assert "the checkpoint of step 6 is broken" in said
    assert "using step 4 instead" in said
    np.testing.assert_allclose(losses(folder), losses(whole_run), rtol=1e-6)


def test_another_learning_rate_is_said_before_the_first_step(
    whole_run, monkeypatch, capfd
):
    class NoCompile:
        def trace(self, *_):
            return self

        def lower(self):
            raise SystemExit("compiles")

    monkeypatch.setattr(by_length, "jit_train_step", lambda *_: NoCompile())
    config = str(whole_run / "config.yaml")
    with pytest.raises(SystemExit, match="compiles"):
        train.main(["--config", config, "--training.num-steps=12"])
    said = capfd.readouterr().out
    assert "resuming after step 6 of 12\nthe learning rate goes from 0.00149" in said
    assert "at step 6 to 0.00656 at step 7: training.num_steps was 6, is 12" in said


REFUSALS = {
    "unknown key": (["--mesh.seqs=4"], "--mesh.seq INT"),
    "huge seed": (["--run.seed=4294967296"], "run.seed must be below 2^32"),
    "all smoothed": (
        ["--training.label-smoothing=1"],
        "training.label_smoothing must be below 1, not 1.0",
    ),
    "negative z-loss": (["--training.z-loss=-1"], "training.z_loss must be not neg"),
    "wrong type": (["--training.num-steps=many"], "num-steps"),
    "mesh and devices": (["--mesh.seq=3"], "takes 6 devices, but there are 8"),
    "strategy and mesh": (
        ["--model.strategy=ring"],
        "strategy ring spreads tokens over ring alone, above 1, but the mesh has ring",
    ),
    "groups of heads in a ring": (
        ["--mesh.data=1", "--mesh.ring=2", "--mesh.seq=4", "--memory.head-chunks=2"],
        "head_chunks 2 does not divide what a device has of 2 key/value heads / seq 4 "
        "= 1 key/value heads, rounded up: over ring",
    ),
    "reference in a ring": (
        ["--mesh.ring=2", "--mesh.seq=2", "--model.attention=reference"],
        "model.attention reference attends to whole rows, but strategy hybrid",
    ),
    "heads over tensor": (
        ["--mesh.data=1", "--mesh.tensor=8", "--mesh.seq=1"],
        "model.num_heads 4 does not divide over mesh.tensor 8: use mesh.tensor 2, "
        "mesh.fsdp 4; or mesh.tensor 1, mesh.fsdp 8",
    ),
    "batch over data": (["--training.batch-size=7"], "use a batch_size of 8"),
    "kv heads": (["--model.num-kv-heads=3"], "does not divide model.num_heads 4"),
    "head chunks": (["--memory.head-chunks=3"], "use one of"),
    "cuDNN without a GPU": (
        ["--model.attention=cudnn", "--model.compute-dtype=bfloat16"],
        "attention cudnn needs GPUs, and these are cpu devices",
    ),
    "negative": (["--training.learning-rate=-1"], "not negative, not -1"),
    "no corpus": (["--data.files=/nowhere/at/all"], "/nowhere/at/all"),
    "small vocabulary": (["--model.vocab-size=128"], "257"),
    "half a pod": (["--distributed.process-id=0"], "missing: coordinator"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_is_refused_before_anything_is_written(
    config_file, tmp_path, capfd, name
):
    overrides, message = REFUSALS[name]
    with pytest.raises(SystemExit) as stopped:
        start(config_file, tmp_path / "run", *overrides)
    assert stopped.value.code == 2
    said = capfd.readouterr()
    assert message in said.err + said.out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("model: {num_layer: 3}", "did you mean 'model.num_layers'"),
        ("model: {num_layers: three}", "model.num_layers must be int, not 'three'"),
        ("training: 3", "training is a section"),
        ("model: [", "not valid YAML"),
    ],
)
def test_a_bad_config_file(tmp_path, capfd, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        start(tmp_path / "bad.yaml", tmp_path / "run")
    assert stopped.value.code == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "override, message",
    [
        ("--model.width=64", "model.width was 32, is 64"),
        ("--training.batch-size=16", "training.batch_size was 8, is 16"),
        (
            "--training.optimizer=lion",
            "training.optimizer adamw, and .* says lion: set",
        ),
    ],
)
def test_another_model_or_data_is_not_resumed(
    whole_run, config_file, capfd, override, message
):
    before = {p: p.stat().st_mtime_ns for p in whole_run.rglob("*")}
    with pytest.raises(SystemExit) as stopped:
        start(config_file, whole_run, override)
    assert stopped.value.code == 2
    assert re.search(message, capfd.readouterr().err)
    assert before == {p: p.stat().st_mtime_ns for p in whole_run.rglob("*")}


def test_a_full_disk_is_refused(config_file, tmp_path, capfd, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(SystemExit) as stopped:
        start(config_file, tmp_path / "run")
    assert stopped.value.code == 2
    assert "checkpoints need" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(config_file, tmp_path, capfd):
    """With a step in flight and a save at each: none of it is saved or logged."""
    folder = tmp_path / "run"
    each = "--training.checkpoint-interval-steps=1"
    alone = "--training.validation-batches=0"  # which reads a step's numbers itself
    with pytest.raises(SystemExit) as stopped:
        start(config_file, folder, "--training.learning-rate=1e30", each, alone)
    assert stopped.value.code == 2
    err = capfd.readouterr().err
    said = re.search(r"is nan at step (\d): lower training.learning_rate", err)
    assert said is not None, err
    steps = [row["step"] for row in read_rows(folder / "metrics.jsonl")]
    assert steps == list(range(1, int(said[1])))
    assert "NaN" not in (folder / "metrics.jsonl").read_text()
    saved = sorted(int(path.name) for path in (folder / "checkpoints").iterdir())
    assert saved == steps[-2:]
    for step in saved:  # by plain Orbax, on as many devices
        state = ocp.StandardCheckpointer().restore(folder / "checkpoints" / str(step))
        assert state["step"] == step
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


@pytest.mark.slow
def test_a_wait_for_data_is_in_its_row_and_said(
    whole_run, config_file, tmp_path, monkeypatch, capfd
):
    """Of a source that is slower than a step; of one that is not, there is next to
    none."""
    read = Rows.read

    def slow(self, *where):
        time.sleep(0.1)
        return read(self, *where)

    monkeypatch.setattr(Rows, "read", slow)
    start(config_file, tmp_path / "slow", "--training.validation-batches=0")
    out = capfd.readouterr().out
    assert re.search(r"\d of the steps' \d+.\d s were waits for data: use a fas", out)
    found = {}
    for folder in (whole_run, tmp_path / "slow"):
        rows = read_rows(folder / "metrics.jsonl")[2:]
        found[folder.name] = [
            sum(row.get(name, 0.0) for row in rows)
            for name in ("data_seconds", "seconds")
        ]
    assert found["slow"][0] > 0.7 * found["slow"][1] > 0.5
    assert found["run"][0] < 0.1 * found["slow"][0]


class NoAnswers:
    """Of what no token counts."""

    def __call__(self, data):
        return np.frombuffer(data, np.uint8).astype(np.uint16), np.zeros(
            len(data), bool
        )


def test_a_validation_in_which_no_token_counts_is_refused(
    config_file, tmp_path, corpus, capfd
):
    """Before a step is compiled; it would have no loss, and not one of 0."""
    encoder = NoAnswers()
    prepare(str(corpus), tmp_path / "in", encoder=encoder, with_counts=True)
    with pytest.raises(SystemExit) as stopped:
        start(config_file, tmp_path / "run", f"--data.files={tmp_path / 'in'}")
    assert stopped.value.code == 2
    out, err = capfd.readouterr()
    assert "of 64 that would validate counts" in err and "compiling" not in out


def test_a_validation_that_is_not_finite_is_not_saved(
    config_file, tmp_path, monkeypatch, capfd
):
    broken = lambda *_: (jnp.float32(jnp.nan), jnp.int32(1))  # noqa: E731
    monkeypatch.setattr(loop, "make_validation_step", lambda *_: broken)
    folder = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        start(config_file, folder)
    assert stopped.value.code == 2
    assert "validation_loss is nan at step 3" in capfd.readouterr().err
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["2"]


def test_a_signal_in_a_long_validation(config_file, tmp_path, monkeypatch, capfd):
    """It is left, and the step saved: a scheduler does not wait for long."""
    batches, taken = loop.validation_batches, []

    def killed(*args, **options):
        for batch in batches(*args, **options):
            taken.append(len(taken) + 1)
            if len(taken) == 2:
                os.kill(os.getpid(), signal.SIGUSR1)
                time.sleep(0.5)  # a thread hears it
            yield batch

    monkeypatch.setattr(loop, "validation_batches", killed)
    long = ("--training.validation-batches=100", "--data.validation-fraction=0.9")
    folder = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        start(config_file, folder, *long)
    assert stopped.value.code == 130 and taken == [1, 2]
    assert "stopped at step 3" in capfd.readouterr().out
    assert (folder / "checkpoints" / "3").is_dir()
    assert validation_losses(folder) == []


@pytest.mark.parametrize("which", [1, 2], ids=["in the run", "the last one"])
def test_a_validation_that_was_left_is_made_up(
    config_file, whole_run, tmp_path, monkeypatch, capfd, which
):
    """By the next start, and by no other: its row is as if nothing had happened."""
    batches, begun = loop.validation_batches, []

    def told(*args, **options):
        begun.append(len(begun) + 1)
        for batch in batches(*args, **options):
            if begun[-1] == which:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.5)  # a thread hears it
            yield batch

    folder = tmp_path / "run"
    monkeypatch.setattr(loop, "validation_batches", told)
    with pytest.raises(SystemExit) as stopped:
        start(config_file, folder)
    assert stopped.value.code == 130 and begun[-1] == which
    assert f"stopped at step {3 * which}" in capfd.readouterr().out
    assert len(validation_losses(folder)) == which - 1
    start(config_file, folder)
    assert losses(folder).tolist() == losses(whole_run).tolist()
    assert validation_losses(folder) == validation_losses(whole_run)
    num, before = len(begun), (folder / "metrics.jsonl").read_text()
    capfd.readouterr()
    start(config_file, folder)
    assert "nothing left to do" in capfd.readouterr().out and len(begun) == num
    assert (folder / "metrics.jsonl").read_text() == before


def test_a_second_run_in_one_folder_is_refused(whole_run, config_file, capfd):
    before = {p: p.stat().st_mtime_ns for p in whole_run.rglob("*") if p.is_file()}
    with RunLock(whole_run) as other:
        other.take()
        with pytest.raises(SystemExit) as stopped:
            start(config_file, whole_run, "--training.num-steps=8")
        assert (whole_run / "lock").exists()
    said = capfd.readouterr()
    assert stopped.value.code == 2 and "compiled" not in said.out
    assert f"is another run's, process {os.getpid()} on" in said.err
    after = {p: p.stat().st_mtime_ns for p in whole_run.rglob("*") if p.is_file()}
    assert after == before


DOORS = {
    "train.py": [str(ROOT / "train.py")],
    "python -m ulysses_jax.train": ["-m", "ulysses_jax.train"],
}


def started(*argv, door="train.py", options=()):
    """As a user starts it, in the checkout or wherever the package is installed."""
    return subprocess.Popen(
        [sys.executable, *options, *DOORS[door], *map(str, argv)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


INTERRUPTED = (
    ": interrupted; the same command goes on from the last checkpoint, if "
    "there is one\n"
)


@pytest.mark.parametrize("door", DOORS)
def test_ctrl_c_while_it_imports(door):
    run = started(door=door, options=["-X", "importtime"])
    assert run.stderr is not None
    while not (line := run.stderr.readline()).strip().endswith(" dataclasses"):
        assert line
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    said = "".join(x for x in err.splitlines(True) if not x.startswith("import time"))
    assert (run.returncode, out, said) == (130, "", door + INTERRUPTED)


def test_ctrl_c_while_it_compiles(config_file, tmp_path):
    """Just after the first lines, where libraries have callbacks that lose errors."""
    one = ("--run.simulated-cpu-devices=1", "--mesh.data=1", "--mesh.seq=1")
    run = started("--config", config_file, "--run.folder", tmp_path / "run", *one)
    assert run.stdout is not None and "parameters" in run.stdout.readline()
    time.sleep(0.25)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert (run.returncode, err) == (130, "train.py" + INTERRUPTED)


DRIVER = """
import sys
sys.path.insert(0, {root!r})
import jax
{prelude}
import ulysses_jax.data.stream as stream
read_bytes, num_bytes = stream.read_bytes, 0
def counted(document, offset, count):
    global num_bytes
    num_bytes += count
    return read_bytes(document, offset, count)
stream.read_bytes = counted
from ulysses_jax.train import main
main(sys.argv[1:])
print("bytes read:", num_bytes, "processes:", jax.process_count())
"""


def run_process(config_file, folder, *overrides, env=None, prelude=""):
    driver = DRIVER.format(root=str(ROOT), prelude=prelude)
    options = ["--config", str(config_file), "--run.folder", str(folder), "--quiet"]
    return run_script(driver, *options, *overrides, env=env or {})


def run_script(script, *argv, env):
    outside = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    return subprocess.Popen(
        [sys.executable, "-c", script, *argv],
        # Not every output can say every file's name.
        env=outside | {"JAX_PLATFORMS": "cpu", "PYTHONIOENCODING": "ascii"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process):
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    found = re.search(r"bytes read: (\d+) processes: (\d+)", out)
    assert found is not None
    return int(found[1]), int(found[2])


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def test_two_processes_with_seq_across_them(config_file, tmp_path):
    """Same losses as one process; each reads its half; one checkpoint of both."""
    mesh = ("--mesh.data=1", "--mesh.seq=8", "--training.num-steps=4")
    # JAX's options for who wants no promotion in code of their own; ours has it.
    strict = dict(JAX_NUMPY_RANK_PROMOTION="raise", JAX_NUMPY_DTYPE_PROMOTION="strict")
    alone = run_process(config_file, tmp_path / "one", *mesh, env=strict)
    flags = (
        "--run.simulated-cpu-devices=4",
        f"--distributed.coordinator=127.0.0.1:{free_port()}",
        "--distributed.num-processes=2",
    )
    pair = [
        run_process(
            config_file,
            tmp_path / "two",
            *mesh,
            *flags,
            f"--distributed.process-id={rank}",
        )
        for rank in range(2)
    ]
    alone_bytes, _ = finished(alone)
    halves = [finished(process) for process in pair]
    assert [count for _, count in halves] == [2, 2]
    for half_bytes, _ in halves:
        # Batches that are read ahead when the run ends make the counts differ a little.
        assert 0.3 * alone_bytes < half_bytes < 0.7 * alone_bytes
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(two) == 4
    np.testing.assert_allclose(two, one, rtol=1e-6)
    # What two wrote together, one process on another mesh resumes.
    start(config_file, tmp_path / "two")
    start(config_file, tmp_path / "one", *mesh[:2])
    assert len(losses(tmp_path / "two")) == 6
    np.testing.assert_allclose(
        losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5
    )


SMALL_DISK = """
import ulysses_jax.training.preflight as preflight
def check_space(*_):
    if jax.process_index() == 1:
        raise OSError("no room here")
preflight.check_space = check_space
"""
FULL_DISK = """
from ulysses_jax.training.metrics import RunLog
def log_step(self, step, *_, **__):
    if jax.process_index() == 0:
        raise OSError("the disk is full")
RunLog.log_step = log_step
"""


FAILED_WRITE = """
from ulysses_jax.training import checkpoint
def aside(x):
    if jax.process_index() == 1:
        raise OSError("not written")
    return x
checkpoint.aside = aside
"""


TOLD = """
import os, signal
from ulysses_jax.training import loop
batches = loop.validation_batches
def told(*args, **options):
    for batch in batches(*args, **options):
        if jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch
loop.validation_batches = told
"""
# The other one is in it still when this one is told.
LONG_VALIDATION = (
    "--training.validation-interval-steps=2",
    "--training.validation-batches=9",
    "--data.validation-fraction=0.9",
)


@pytest.mark.parametrize(
    "prelude, rank, said",
    [
        pytest.param(
            SMALL_DISK, 1, "no room here", id="before the start", marks=pytest.mark.slow
        ),
        pytest.param(FULL_DISK, 0, "the disk is full", id="in a step"),
        pytest.param(
            FAILED_WRITE, 1, "not written", id="in a save", marks=pytest.mark.slow
        ),
        pytest.param(TOLD, 1, "", id="told in a validation", marks=pytest.mark.slow),
    ],
)
def test_one_process_that_stops_stops_the_others(
    config_file, tmp_path, prelude, rank, said
):
    """With its code, and why; none waits in a collective until a timeout."""
    port = free_port()
    pair = [
        run_process(
            config_file,
            tmp_path / "run",
            "--run.simulated-cpu-devices=4",
            f"--distributed.coordinator=127.0.0.1:{port}",
            "--distributed.num-processes=2",
            f"--distributed.process-id={each}",
            *(LONG_VALIDATION if prelude is TOLD else ()),
            prelude=prelude,
        )
        for each in range(2)
    ]
    errors = [process.communicate(timeout=240)[1] for process in pair]
    code = 130 if prelude is TOLD else 2
    assert [process.returncode for process in pair] == [code, code]
    assert said in errors[rank] and "Traceback" not in "".join(errors)
    others = errors[1 - rank]
    if prelude is TOLD:
        assert all("Stopped" not in x for x in errors)
        assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]
    else:
        ended = f"process {rank} ended the run: "
        assert ended in others or f"[{rank}] refuse" in others
    if prelude is SMALL_DISK:
        assert not (tmp_path / "run").exists()


LAUNCHED = """
import jax
jax.config.update("jax_num_cpu_devices", 2)
from ulysses_jax.distributed import start_distributed
from ulysses_jax.mesh import make_mesh
start_distributed()
mesh = make_mesh(data=2, seq=2)
print([[d.process_index for d in row] for row in mesh.devices.reshape(2, 2)])
"""


def test_slurm_starts_two_processes(tmp_path):
    port = free_port()
    pair = [
        run_script(
            LAUNCHED,
            env={
                "SLURM_JOB_ID": "4242",
                "SLURM_STEP_NODELIST": "127.0.0.1",
                "SLURM_STEP_NUM_NODES": "1",
                "SLURM_NTASKS": "2",
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank),
                "JAX_COORDINATOR_PORT": str(port),
            },
        )
        for rank in range(2)
    ]
    for process in pair:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert "[[0, 0], [1, 1]]" in out  # seq stays inside a process


@pytest.mark.slow
def test_xla_flags_say_how_many_devices(config_file, tmp_path):
    four = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    steps = "--training.num-steps=1"
    process = run_process(config_file, tmp_path / "run", steps, env=four)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "takes 8 devices, but there are 4" in err


@pytest.mark.parametrize(
    "word, value", [("False", False), ("true", True), ("null", None)]
)
def test_a_field_that_may_be_null_on_the_command_line(word, value):
    config = ROOT / "configs" / "tiny.yaml"
    for words in (["--model.zigzag", word], [f"--model.zigzag={word}"]):
        assert load(config, words).model.zigzag is value
    assert load(config, ["--quiet", "--data.mask-documents", "false"]).quiet


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ["--model.zigzag", "1"],
            "model.zigzag must be true or false or null, not '1'",
        ),
        (["--data.balance=on"], "data.balance must be true or false, not 'on'"),
        (["--quiet", "1"], "quiet must be true or false, not '1'"),
    ],
)
def test_what_is_no_truth_is_refused_as_in_a_file(words, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        load(ROOT / "configs" / "tiny.yaml", words)


def test_a_kind_that_is_none_is_named_before_processes_meet(monkeypatch, capsys):
    def meet(**options):
        pytest.fail("they met")

    monkeypatch.setattr("ulysses_jax.distributed.start_distributed", meet)
    path = str(ROOT / "configs" / "tiny.yaml")
    with pytest.raises(SystemExit) as end:
        train.main(["--config", path, "--model.pattern", "full", "linaer"])
    assert end.value.code == 2
    assert "model.pattern has 'linaer', which is no kind" in capsys.readouterr().err


ARENAS = """
import ctypes, sys, threading
from ulysses_jax.train import _fewer_arenas
_fewer_arenas()
alike, libc = threading.Barrier(64), ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def take():
    alike.wait()
    libc.malloc(4000)
    alike.wait()
threads = [threading.Thread(target=take) for _ in range(64)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
libc.fdopen.restype = ctypes.c_void_p
libc.malloc_info(0, ctypes.c_void_p(libc.fdopen(1, b"w")))
libc.fflush(None)
"""


@pytest.mark.parametrize(
    "named", ["MALLOC_ARENA_MAX={}", "GLIBC_TUNABLES=glibc.malloc.arena_max={}", None]
)
def test_threads_share_an_arena_a_core(named):
    """But where the user says how many."""
    cores = os.cpu_count() or 1
    most = cores + 5 if named else cores
    outside = dict([named.format(most).split("=", 1)] if named else [])
    ended = subprocess.run(
        [sys.executable, "-c", ARENAS],
        capture_output=True,
        text=True,
        env=os.environ | outside,
    )
    assert ended.returncode == 0, ended.stderr
    # One may have been made before it was called.
    assert ended.stdout.count("<heap nr=") in (most, most + 1)
