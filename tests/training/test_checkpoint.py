"""Checkpoints: exact round trips over meshes; every planted fault is seen."""

import dataclasses
import gc
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from files import ROOT
from flax import nnx
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from ulysses_jax import make_mesh
from ulysses_jax.complete import complete_model
from ulysses_jax.config import Model
from ulysses_jax.training import array_files, checkpoint
from ulysses_jax.training.arrays import describe
from ulysses_jax.training.checkpoint import Checkpointer
from ulysses_jax.training.preflight import (
    architecture,
    check_space,
    refuse_other_model,
)
from ulysses_jax.training.proof import COMMIT_FILE, read_commit, write_commit

META = {"model": {"width": 8, "norm": "rms"}, "tokens_read": 2**40, "data": "f00d"}
MESHES = {
    "seq8": dict(seq=8),
    "data2 seq4": dict(data=2, seq=4),
    "seq2 tensor4": dict(seq=2, tensor=4),
    "one": dict(),
}


ONE = SingleDeviceSharding(jax.devices()[0])


class Extra(NamedTuple):
    bits: jax.Array
    nothing: None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: jax.Array
    parameters: dict
    model: nnx.State
    optimizer: optax.OptState
    extra: Extra


def mesh_of(name):
    devices = jax.devices()[:1] if name == "one" else None
    return make_mesh(**MESHES[name], devices=devices)


def make_state(mesh, seed=0, rows=16):
    keys = jax.random.split(jax.random.key(seed), 2)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))  # noqa: E731
    kernel = put(jax.random.normal(keys[0], (rows, 8)), ("fsdp", "seq"), "tensor")
    parameters = {
        "kernel": kernel,
        "scale": put(jax.random.normal(keys[1], (5,)).astype(jnp.bfloat16)),
    }
    model = nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(seed)))
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(1e-3, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    )
    state = State(
        step=jnp.int32(seed),
        parameters=parameters,
        model=jax.tree.map(put, model),
        optimizer=optimizer.init(parameters),
        extra=Extra(put(jnp.arange(6, dtype=jnp.uint8)), None),
    )
    return jax.tree.map(
        lambda x: x if isinstance(x.sharding, NamedSharding) else put(x), state
    )


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype and x.sharding == y.sharding
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def save_steps(folder, steps, mesh, **options):
    with Checkpointer(folder, interval_steps=1, **options) as checkpointer:
        for step in steps:
            checkpointer.save(step, make_state(mesh, seed=step), META)


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory):
    """A folder with the checkpoints of steps 10 and 20; tests work on copies."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    save_steps(folder, [10, 20], mesh_of("data2 seq4"))
    return folder


@pytest.fixture
def folder(two_saved, tmp_path):
    return Path(shutil.copytree(two_saved, tmp_path / "checkpoints"))


def restore(folder):
    """What a new run finds: step, state's seed, and what it was told."""
    said = []
    target = abstract(make_state(mesh_of("data2 seq4")))
    with Checkpointer(folder, interval_steps=1) as checkpointer:
        found = checkpointer.restore(target, on_skipped=said.append)
    if found is None:
        return None, said
    step, state, meta = found
    assert_same(state, make_state(mesh_of("data2 seq4"), seed=step))
    assert meta == META
    return step, said


@pytest.mark.parametrize(
    "saved_on, restored_on",
    [
        ("seq8", "data2 seq4"),
        ("data2 seq4", "seq8"),
        ("seq2 tensor4", "one"),
        ("one", "seq2 tensor4"),
    ],
)
def test_round_trip_onto_another_mesh(tmp_path, saved_on, restored_on):
    save_steps(tmp_path, [7], mesh_of(saved_on))
    expected = make_state(mesh_of(restored_on), seed=7)
    with Checkpointer(tmp_path, interval_steps=1) as checkpointer:
        assert checkpointer.latest_meta() == (7, META)
        found = checkpointer.restore(abstract(expected))
    assert found is not None
    assert found[0] == 7 and found[2] == META
    assert_same(found[1], expected)


def test_abstract_state_without_devices(tmp_path):
    """What `jax.eval_shape` gives goes onto the mesh that is set."""
    explicit = AxisType.Explicit
    make = lambda: {"w": jnp.ones((8, 4), out_sharding=P("seq")), "n": jnp.int32(3)}  # noqa: E731
    with jax.set_mesh(make_mesh(seq=8, axis_type=explicit)):
        with Checkpointer(tmp_path, interval_steps=1) as checkpointer:
            checkpointer.save(1, jax.jit(make)(), META)
    mesh = make_mesh(data=2, seq=4, axis_type=explicit)
    with jax.set_mesh(mesh):
        target = jax.eval_shape(make)
        with Checkpointer(tmp_path, interval_steps=1) as checkpointer:
            found = checkpointer.restore(target)
        expected = {
            "w": jax.device_put(
                np.ones((8, 4), np.float32), NamedSharding(mesh, P("seq"))
            ),
            "n": jax.device_put(np.int32(3), NamedSharding(mesh, P())),
        }
    assert found is not None
    for name, x in found[1].items():
        assert x.sharding.is_equivalent_to(expected[name].sharding, x.ndim)
        assert x.sharding.mesh == mesh
        assert (np.asarray(x) == np.asarray(expected[name])).all()
    with Checkpointer(tmp_path, interval_steps=1) as checkpointer:
        with pytest.raises(ValueError, match="jax.set_mesh"):
            checkpointer.restore(target)


def test_donated_right_after_save(tmp_path):
    state, expected = (make_state(mesh_of("seq8"), seed=3) for _ in range(2))
    target = abstract(state)
    change = jax.jit(
        lambda s: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), s),
        donate_argnums=0,
    )
    meta = {"position": [1]}
    with Checkpointer(tmp_path, interval_steps=1) as checkpointer:
        checkpointer.save(3, state, meta)
        meta["position"].append(2)
        jax.block_until_ready(change(state))
        checkpointer.wait()
        found = checkpointer.restore(target)
    assert found is not None and found[2] == {"position": [1]}
    assert_same(found[1], expected)


def test_save_goes_on_in_the_background(tmp_path, monkeypatch):
    """`save` returns while the commit is held back; only the commit offers the step."""
    release = threading.Event()
    commit = Checkpointer._write_commit

    def held(self):
        assert release.wait(30)
        commit(self)

    monkeypatch.setattr(Checkpointer, "_write_commit", held)
    state = make_state(mesh_of("seq8"), seed=1)
    with Checkpointer(tmp_path, interval_steps=1) as checkpointer:
        checkpointer.save(1, state, META)
        assert checkpointer.latest_meta() is None
        release.set()
        checkpointer.wait()
        assert checkpointer.latest_meta() == (1, META)


def test_none_at_all(tmp_path):
    assert restore(tmp_path / "absent") == (None, [])
    with Checkpointer(tmp_path / "absent", interval_steps=1) as checkpointer:
        assert checkpointer.latest_meta() is None


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwrite(path):
    path.write_bytes(b"\xff" * path.stat().st_size)


def largest(folder):
    return max(folder.rglob("*"), key=lambda p: p.stat().st_size * p.is_file())


@pytest.mark.parametrize(
    "fault, reason",
    [
        (flip, "has other bytes"),
        (overwrite, "has other bytes"),
        (truncate, "bytes, not"),
        (Path.unlink, "No such file"),
    ],
)
def test_broken_array_file_is_skipped(folder, fault, reason):
    path = largest(folder / "20" / "ocdbt.process_0")
    fault(path)
    step, (said,) = restore(folder)
    assert step == 10
    for part in ("step 20 is broken", path.name, reason, "using step 10 instead"):
        assert part in said


@pytest.mark.parametrize("fault", [flip, truncate, overwrite, Path.unlink])
def test_broken_commit_file_is_skipped(folder, fault):
    fault(folder / "20" / COMMIT_FILE)
    step, (said,) = restore(folder)
    assert step == 10 and COMMIT_FILE in said
    with Checkpointer(folder, interval_steps=1) as checkpointer:
        assert checkpointer.latest_meta() == (10, META)


@pytest.mark.parametrize("fault", [flip, Path.unlink])
def test_no_file_can_break_unseen(two_saved, tmp_path, fault, monkeypatch):
    """Whichever file is hit, what comes back is exactly what was saved; and Orbax
    never sees it, nor another file of its folder."""
    read, whole = [], ocp.PyTreeCheckpointHandler.restore

    def restored(self, path, **args):
        read.append(path.name)
        return whole(self, path, **args)

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", restored)
    for path in sorted(p for p in (two_saved / "20").rglob("*") if p.is_file()):
        folder = Path(shutil.copytree(two_saved, tmp_path / "c", dirs_exist_ok=True))
        fault(folder / path.relative_to(two_saved))
        # Orbax's own two stamps are never read; everything else is proven.
        stamp = path.name in ("_CHECKPOINT_METADATA", "commit_success.txt")
        step, said = restore(folder)
        assert (step, len(said)) == ((20, 0) if stamp else (10, 1)), path
        assert read.pop() == str(step) and not read


@pytest.mark.parametrize("fault", [overwrite, Path.unlink])
def test_files_of_another_hand_with_checksums_that_are_right(folder, fault):
    """Checksums say that a checkpoint is whole, not who wrote it: what Orbax cannot
    read is refused in words."""
    shutil.rmtree(folder / "10")
    whole, words = folder.with_name("whole"), 0
    shutil.copytree(folder, whole)
    body = read_commit(folder / "20")
    for path in sorted(p for p in (whole / "20").rglob("*") if p.is_file()):
        if path.name in (COMMIT_FILE, "_CHECKPOINT_METADATA"):
            continue
        shutil.copytree(whole, folder, dirs_exist_ok=True)
        fault(folder / path.relative_to(whole))
        (folder / "20" / COMMIT_FILE).unlink()
        write_commit(folder / "20", body)
        target = abstract(make_state(mesh_of("data2 seq4")))
        try:
            with Checkpointer(folder, interval_steps=1) as checkpointer:
                checkpointer.restore(target)
        except ValueError as error:
            assert f"{folder}/20 is no checkpoint of a run" in str(error)
            words += 1
        except OSError as error:
            assert path.name in str(error)
    assert words


def test_a_commit_file_that_names_files_elsewhere(folder):
    outside = folder.with_name("outside")
    shutil.copy(folder / "20" / "_METADATA", outside)
    body = read_commit(folder / "20")
    files = body["files"]
    (folder / "20" / "link").symlink_to(outside)
    for name in ("../../outside", str(outside), "link"):
        text = json.dumps(body | {"files": files | {name: files["_METADATA"]}})
        line = f"{text}\n{zlib.crc32(text.encode())}\n"
        (folder / "20" / COMMIT_FILE).write_text(line)
        step, (said,) = restore(folder)
        assert step == 10 and f"leads to {outside}, out of {folder}/20" in said


@pytest.fixture(scope="module")
def two_large(tmp_path_factory):
    """Steps 1 and 2, of an array too large to be proven before it is read."""
    folder = tmp_path_factory.mktemp("large") / "checkpoints"
    with Checkpointer(folder, interval_steps=1) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"w": jnp.full(2**19, float(step))}, META)
    return folder


LARGE = {"w": jax.ShapeDtypeStruct((2**19,), jnp.float32, sharding=ONE)}


@pytest.mark.parametrize("flipped", [1, 2])
def test_a_large_array_that_is_broken_is_thrown_away(two_large, tmp_path, flipped):
    """Its bytes are proven while it is read."""
    folder = Path(shutil.copytree(two_large, tmp_path / "c"))
    for step in range(flipped, 3):
        flip(largest(folder / str(step)))
    said = []
    with Checkpointer(folder, interval_steps=1) as checkpointer:
        if flipped == 1:
            with pytest.raises(ValueError, match=r"step 2 .* step 1 .* Put a copy"):
                checkpointer.restore(LARGE, on_skipped=said.append)
            return
        found = checkpointer.restore(LARGE, on_skipped=said.append)
    assert found is not None and found[0] == 1
    assert (np.asarray(found[1]["w"]) == 1).all()
    assert "step 2 is broken" in said[0] and "has other bytes; using step 1" in said[0]


def test_what_cannot_be_read_from_whole_files_is_raised(two_large, monkeypatch):
    def fails(*_, **__):
        raise MemoryError("no room")

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", fails)
    with Checkpointer(two_large, interval_steps=1) as checkpointer:
        with pytest.raises(MemoryError, match="no room"):
            checkpointer.restore(LARGE, on_skipped=str)


def test_compressed_as_it_was_before(tmp_path):
    """Checkpoints of earlier versions, which Orbax compressed."""
    state = make_state(mesh_of("seq8"), seed=4)
    with ocp.StandardCheckpointer() as orbax:
        orbax.save(tmp_path / "4", state)
    body = {"step": 4, "meta": META, "arrays": describe(state)}
    write_commit(tmp_path / "4", body)
    assert restore(tmp_path) == (4, [])


def test_all_broken_is_an_error(folder):
    flip(largest(folder / "10" / "ocdbt.process_0"))
    (folder / "20" / COMMIT_FILE).unlink()
    with pytest.raises(ValueError, match="no checkpoint .* is whole") as error:
        restore(folder)
    for part in ("step 10", "step 20", "other bytes", COMMIT_FILE, "--run.folder"):
        assert part in str(error.value)


def test_unfinished_is_told_and_removed_by_the_next_save(folder):
    unfinished = folder / "25.orbax-checkpoint-tmp"
    shutil.copytree(folder / "20", unfinished)
    step, (said,) = restore(folder)
    assert step == 20 and unfinished.name in said and "step 20" in said
    mesh = mesh_of("data2 seq4")
    with Checkpointer(folder, interval_steps=1) as checkpointer:
        checkpointer.restore(abstract(make_state(mesh)), on_skipped=str)
        checkpointer.save(30, make_state(mesh, seed=30), META)
    assert sorted(p.name for p in folder.iterdir()) == ["10", "20", "30"]


def test_a_broken_step_is_written_again(folder):
    """With keep=1 the broken one must not push out the good one."""
    mesh = mesh_of("data2 seq4")
    flip(largest(folder / "20" / "ocdbt.process_0"))
    with Checkpointer(folder, interval_steps=5, keep=1) as checkpointer:
        found = checkpointer.restore(abstract(make_state(mesh)), on_skipped=str)
        assert found is not None and found[0] == 10
        checkpointer.save(15, make_state(mesh, seed=15), META)
        checkpointer.wait()
        assert [p.name for p in folder.iterdir()] == ["15"]
        checkpointer.save(20, make_state(mesh, seed=20), META)
    assert restore(folder) == (20, [])


def test_what_is_no_checkpoint_is_passed_over(folder):
    """Files and folders of others, whatever their names; and they stay."""
    (folder / "9").write_text("mine")
    (folder / "99").write_text("mine")
    others = ("\u00b2", "\u0661\u0662", "0020", "020", "-1", "20 (copy)", "best")
    for name in others:
        (folder / name).mkdir()
    assert restore(folder) == (20, [])
    mesh = mesh_of("one")
    with Checkpointer(folder, interval_steps=1, keep=1) as checkpointer:
        checkpointer.restore(abstract(make_state(mesh)))
        checkpointer.save(30, make_state(mesh, seed=30), META)
    assert {p.name for p in folder.iterdir()} == {"30", "9", "99", *others}


def test_a_file_in_the_way_of_a_checkpoint_is_named(folder):
    (folder / "30").write_text("mine")
    mesh = mesh_of("one")
    with Checkpointer(folder, interval_steps=1) as checkpointer:
        checkpointer.restore(abstract(make_state(mesh)))
        with pytest.raises(
            OSError, match=r"step 30 could .*30 already exists.*step 20"
        ):
            checkpointer.save(30, make_state(mesh, seed=30), META)
    assert restore(folder) == (20, [])


def test_a_save_that_fails_at_once_leaves_no_thread(monkeypatch):
    """Its writers wait for no folder: they would keep the process for two hours."""
    monkeypatch.setattr(array_files, "_SAVE_TIMEOUT_SECONDS", 20)
    before = set(threading.enumerate())
    nowhere = Path("/proc/self")  # where even root makes no folder
    with pytest.raises(OSError, match="step 1 could not be written to /proc/self: "):
        with Checkpointer(nowhere, interval_steps=1) as checkpointer:
            checkpointer.save(1, make_state(mesh_of("one")), META)
    left = set(threading.enumerate()) - before
    for thread in left:
        thread.join(0.0 if thread.daemon else 5.0)
    assert not [thread for thread in left if thread.is_alive() and not thread.daemon]


def test_plain_orbax_reads_a_checkpoint(two_saved):
    """On as many devices as it is; elsewhere as docs/trainer.md says."""
    saved = make_state(mesh_of("data2 seq4"), seed=20)
    orbax = ocp.StandardCheckpointer()
    path = two_saved / "20"
    state = orbax.restore(path)
    assert state["step"] == 20 and state["extra"]["bits"].dtype == jnp.uint8
    for name, x in saved.parameters.items():
        y = state["parameters"][name]
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
    page = (ROOT / "docs" / "trainer.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (block,) = (each for each in blocks if "/abs/path/checkpoints/500" in each)
    found = {}
    exec(block.replace("/abs/path/checkpoints/500", str(path)), found)
    kernel = found["state"]["parameters"]["kernel"]
    assert kernel.sharding == ONE
    assert (np.asarray(kernel) == np.asarray(saved.parameters["kernel"])).all()


def test_keeps_the_newest(tmp_path):
    save_steps(tmp_path, [8, 9, 10, 11], mesh_of("one"), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "11"]


def test_older_ones_go_while_training_goes_on(tmp_path):
    state = make_state(mesh_of("one"))
    with Checkpointer(tmp_path, interval_steps=1, keep=1) as checkpointer:
        checkpointer.save(1, state, META)
        checkpointer.save(2, state, META)
        end = time.monotonic() + 30
        while (tmp_path / "1").exists():
            assert time.monotonic() < end
            checkpointer.due(3)
            time.sleep(0.01)
    assert [p.name for p in tmp_path.iterdir()] == ["2"]


def test_a_save_that_waits_for_the_one_before_says_so_once(tmp_path, monkeypatch):
    commit = Checkpointer._write_commit

    def slow(self):
        time.sleep(0.5)
        commit(self)

    monkeypatch.setattr(Checkpointer, "_write_commit", slow)
    monkeypatch.setattr(checkpoint, "_WAITED_SECONDS", 0.1)
    state = make_state(mesh_of("one"))
    with Checkpointer(tmp_path, interval_steps=10) as checkpointer:
        assert checkpointer.save(10, state, META) is None
        said = checkpointer.save(20, state, META)
        assert checkpointer.save(30, state, META) is None
    number = r"(\d+\.\d) s"
    found = re.fullmatch(
        rf"training stood still for {number}: a checkpoint takes {number} to write, "
        rf"and the next one was due after {number}; raise "
        r"training.checkpoint_interval_steps \(10\) to (\d+) or more",
        said or "",
    )
    assert found, said
    waited, took, due, steps = map(float, found.groups())
    assert waited <= took and abs(waited + due - took) < 0.2 and steps >= 20


def sizes_on_disk(folder):
    paths = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in paths}


def test_each_array_is_written_once(tmp_path):
    """Whole on all of 8 devices, on halves of them, or cut: the same bytes."""
    found = []
    for spec in (P(), P("seq"), P(("data", "seq"))):
        sharding = NamedSharding(make_mesh(data=2, seq=4), spec)
        folder = tmp_path / str(len(found))
        with Checkpointer(folder, interval_steps=1) as checkpointer:
            state = {"w": jax.device_put(np.ones((64, 1024), np.float32), sharding)}
            checkpointer.save(1, state, {})
        found.append(sum(sizes_on_disk(folder).values()))
    assert all(2**18 < size < 2**18 + 20_000 for size in found), found


def test_saving_one_step_twice_is_one_checkpoint(tmp_path):
    save_steps(tmp_path, [8, 8], mesh_of("one"))
    assert [p.name for p in tmp_path.iterdir()] == ["8"]


def test_due(tmp_path):
    with Checkpointer(tmp_path, interval_steps=4) as checkpointer:
        assert [s for s in range(1, 13) if checkpointer.due(s)] == [4, 8, 12]
    with pytest.raises(ValueError, match="interval_steps 0"):
        Checkpointer(tmp_path, interval_steps=0)


def test_checkpoints_of_another_run_are_not_overwritten(folder):
    state = make_state(mesh_of("one"))
    with Checkpointer(folder, interval_steps=1) as checkpointer:
        with pytest.raises(ValueError, match=r"\[10, 20\] of another run"):
            checkpointer.save(5, state, META)
    assert sorted(p.name for p in folder.iterdir()) == ["10", "20"]


def test_other_arrays_are_refused(folder):
    mesh = mesh_of("data2 seq4")
    with Checkpointer(folder, interval_steps=1) as checkpointer:
        with pytest.raises(ValueError, match=r"kernel.*\[16, 8\].*\[24, 8\]"):
            checkpointer.restore(abstract(make_state(mesh, rows=24)))
        cast = dataclasses.replace(
            abstract(make_state(mesh)),
            step=jax.ShapeDtypeStruct(
                (), jnp.float32, sharding=NamedSharding(mesh, P())
            ),
        )
        with pytest.raises(ValueError, match=r"step was \['int32'.*\['float32'"):
            checkpointer.restore(cast)


def test_refuse_other_model():
    model = {"width": 8, "norm": "rms", "num_layers": 2}
    refuse_other_model(dict(model), model)
    with pytest.raises(ValueError) as error:
        refuse_other_model({"width": 16, "norm": "rms", "old": 1}, model)
    for part in (
        "model.width was 16, is 8",
        "model.num_layers was absent, is 2",
        "model.old was 1, is absent",
        "--run.folder",
    ):
        assert part in str(error.value)
    assert "norm" not in str(error.value)


def test_the_pattern_of_layers_belongs_to_the_model():
    full, mixed = (
        architecture(complete_model(Model(**changes)))
        for changes in ({}, dict(pattern=("window", "full"), window=8))
    )
    saved = json.loads(json.dumps(mixed))
    refuse_other_model(saved, mixed)
    with pytest.raises(
        ValueError, match=r"pattern was \['window', 'full'\], is \['full"
    ):
        refuse_other_model(saved, full)


def test_check_space(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage._replace(free=10 * 10**9)
    )
    absent = tmp_path / "runs" / "checkpoints"
    check_space(absent, 5 * 10**9, keep=1)
    with pytest.raises(ValueError) as error:
        check_space(absent, 4 * 10**9, keep=2)
    for part in ("12 GB", "10 GB are free", "keep_checkpoints to 1", "--run.folder"):
        assert part in str(error.value)
    # What is there already is replaced, so it counts as room.
    absent.mkdir(parents=True)
    with open(absent / "old", "wb") as file:
        file.truncate(3 * 10**9)
    check_space(absent, 4 * 10**9, keep=2)


FAILING_WRITER = """
import resource, sys
from pathlib import Path
import jax.numpy as jnp
from ulysses_jax.training.checkpoint import Checkpointer

with Checkpointer(Path(sys.argv[1]), interval_steps=1) as checkpointer:
    checkpointer.save(10, {"w": jnp.arange(8.0)}, {})
    checkpointer.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    try:
        checkpointer.save(20, {"w": jnp.sin(jnp.arange(1e5))}, {})
        checkpointer.wait()
    except OSError as error:
        print(error)
"""


def test_a_failed_write_is_told_and_never_offered(tmp_path):
    """A real failure of the writer: files that may not grow. In a process of its own,
    because Orbax's writes that are still under way complain on stderr."""
    run = subprocess.run(
        [sys.executable, "-c", FAILING_WRITER, tmp_path],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert "step 20 could not be written" in run.stdout
    assert "File too large" in run.stdout and "step 10 is whole" in run.stdout
    target = {"w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=ONE)}
    with Checkpointer(tmp_path, interval_steps=1) as checkpointer:
        found = checkpointer.restore(target, on_skipped=str)
        assert found is not None and found[0] == 10
        assert (np.asarray(found[1]["w"]) == np.arange(8)).all()
        checkpointer.save(20, found[1], {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "20"]


PAIR = """
import sys, jax, numpy as np
from pathlib import Path
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
from jax.sharding import NamedSharding, PartitionSpec as P
from ulysses_jax import make_mesh
from ulysses_jax.training.checkpoint import Checkpointer
mesh = make_mesh(data=2, seq=2)
def put(x, *spec):
    sharding = NamedSharding(mesh, P(*spec))
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
whole = np.arange(2**20, dtype=np.float32)
specs = {"cut": P(("data", "seq")), "alike": P(), "half": P("seq")}
state = {name: put(whole, *spec) for name, spec in specs.items()}
describe = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
shapes = jax.tree.map(describe, state)
with Checkpointer(Path(sys.argv[3]), interval_steps=1) as checkpointer:
    if sys.argv[4] == "save":
        checkpointer.save(1, state, {})
        checkpointer.save(2, state, {})
    else:
        step, found, _ = checkpointer.restore(shapes)
        shards = [x for y in found.values() for x in y.addressable_shards]
        same = all((x.data == whole[x.index]).all() for x in shards)
        print("restored", step, same)
"""


def pair(folder, what):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    words = (str(folder), what)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PAIR, str(port), str(rank), *words],
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return said


@pytest.mark.slow
def test_two_processes_write_and_prove_a_half_each(tmp_path):
    """No array twice, each file proven, and both take the older one of two."""
    pair(tmp_path, "save")
    sizes = sizes_on_disk(tmp_path / "2")
    for process in (0, 1):
        own = f"ocdbt.process_{process}/"
        written = sum(size for name, size in sizes.items() if name.startswith(own))
        assert 6 * 2**20 < written < 6 * 2**20 + 20_000, sizes
    proven = json.loads((tmp_path / "2" / COMMIT_FILE).read_text().split("\n")[0])
    stamps = {COMMIT_FILE, "_CHECKPOINT_METADATA", "commit_success.txt"}
    assert set(proven["files"]) == set(sizes) - stamps
    assert all("restored 2 True" in words for words in pair(tmp_path, "restore"))
    large = sorted(name for name, size in sizes.items() if size > 2**20)
    for name in large[:2]:  # one of each process's part
        flip(tmp_path / "2" / name)
        said = pair(tmp_path, "restore")
        assert all("restored 1 True" in words for words in said)
        assert f"step 2 is broken: {name} has other bytes; using step 1" in said[0]
        flip(tmp_path / "2" / name)  # as it was


ON_A_SMALL_DISK = """
import os, subprocess, sys
from pathlib import Path
import jax, numpy as np
import jax.numpy as jnp
from ulysses_jax.training.checkpoint import Checkpointer
disk = Path(sys.argv[1])
mount = lambda *words: subprocess.run(["mount", *words, disk], check=True)
mount("-t", "tmpfs", "-o", "size=9m", "none")
one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
shapes = {"w": jax.ShapeDtypeStruct((2**19,), jnp.float32, sharding=one)}
def tried(step):
    with Checkpointer(disk / "checkpoints", interval_steps=1) as checkpointer:
        found = checkpointer.restore(shapes)
        print("whole:", found and (found[0], bool((found[1]["w"] == found[0]).all())))
        checkpointer.save(step, {"w": jnp.full(2**19, float(step))}, {})
def fails(step):
    try:
        tried(step)
    except OSError as error:
        print(error)
tried(10)
(disk / "filler").write_bytes(b"x" * (6 << 20))
fails(20)
(disk / "filler").unlink()
mount("-o", "remount,ro")
fails(30)
mount("-o", "remount,rw")
tried(40)
tried(50)
"""


def may_mount():
    words = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        return subprocess.run(words, capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(
    not may_mount() and "ULYSSES_NEEDS_MOUNTS" not in os.environ,
    reason="no file system may be mounted here",
)
def test_a_disk_that_is_full_or_read_only(tmp_path):
    """For real: the one before stays whole, it is said, and later ones are saved."""
    run = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", ON_A_SMALL_DISK, tmp_path],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    said = run.stdout.splitlines()
    assert said[0] == "whole: None" and said[-1] == "whole: (40, True)", said
    assert said.count("whole: (10, True)") == 3
    full, read_only = (
        next(x for x in said if f"of step {n} could" in x) for n in (20, 30)
    )
    assert "No space left" in full and "GB free" in full and "step 10 is whole" in full
    assert "Read-only file system" in read_only and "step 10 is whole" in read_only


@pytest.mark.slow
def test_memory_of_a_restore_on_another_mesh(tmp_path):
    """At most one array beyond the restored state; and as much
    as is always read at once, 64 MiB, where that is more. As `malloc` keeps
    what it was given back, it is told not to."""
    grown = {}
    for what in ("save", "restore"):
        words = ("--peak", what, "0.5", "--folder", tmp_path / "checkpoints")
        run = subprocess.run(
            [sys.executable, ROOT / "benchmarks" / "checkpoints.py", *words],
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"},
            capture_output=True,
            text=True,
            check=True,
        )
        grown[what] = int(run.stdout.split()[-1]) / 2**20
    assert grown["save"] < 64 and grown["restore"] < 64, grown


def full_disk(*_):
    # The words of tensorstore 0.1.86 on a full tmpfs.
    raise ValueError(
        'RESOURCE_EXHAUSTED: Error writing "w/0.0" in OCDBT database: Failed to write '
        "1799895 bytes to file 4: No space left on device [os_error_code='28']"
    )


@pytest.mark.parametrize("call", ["due", "save", "close"])
def test_a_full_disk_surfaces_at_the_next_call(
    tmp_path, monkeypatch, call, capfd, caplog
):
    state = make_state(mesh_of("one"), seed=1)
    monkeypatch.setattr(Checkpointer, "_write_commit", full_disk)
    checkpointer = Checkpointer(tmp_path, interval_steps=1)
    checkpointer.save(1, state, META)
    for thread in threading.enumerate():
        if thread.name == "async_save":
            thread.join()
    with pytest.raises(OSError, match=r"No space left.* GB free.*no checkpoint before"):
        match call:
            case "due":
                checkpointer.due(2)
            case "save":
                checkpointer.save(2, state, META)
            case "close":
                checkpointer.close()
    late = tmp_path / "1.orbax-checkpoint-tmp"  # a writer that was still at it
    late.mkdir(exist_ok=True)
    checkpointer.close()
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_an_error_in_training_is_not_hidden_by_a_failed_save(tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpointer, "_write_commit", full_disk)
    with pytest.raises(KeyError) as error:
        with Checkpointer(tmp_path, interval_steps=1) as checkpointer:
            checkpointer.save(1, make_state(mesh_of("one")), META)
            raise KeyError("training")
    assert "No space left" in error.value.__notes__[0]


def test_a_save_leaves_few_objects(tmp_path):
    """Of what TensorStore answers, some stays: 50 a save of two arrays, once caches are
    full; its metrics would be 240 more."""
    state = {"a": jnp.zeros(8), "b": jnp.zeros(8)}
    gc.freeze()  # of the tests before: 20 s to look through
    with Checkpointer(tmp_path, interval_steps=1, keep=1) as checkpointer:
        left = []
        for step in range(1, 13):
            checkpointer.save(step, state, META)
            checkpointer.wait()
            gc.collect()
            left.append(sys.getallocatedblocks())
    gc.unfreeze()
    assert np.median(np.diff(left)) < 200
