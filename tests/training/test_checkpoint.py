"""Checkpoints: exact round trips over meshes; every planted fault is seen."""

import dataclasses
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import threading
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
from ulysses_jax.training import checkpoint
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
    read, whole = [], ocp.StandardCheckpointer.restore

    def restored(self, path, *args):
        read.append(path.name)
        return whole(self, path, *args)

    monkeypatch.setattr(ocp.StandardCheckpointer, "restore", restored)
    for path in sorted(p for p in (two_saved / "20").rglob("*") if p.is_file()):
        folder = Path(shutil.copytree(two_saved, tmp_path / "c", dirs_exist_ok=True))
        fault(folder / path.relative_to(two_saved))
        # Orbax's own two stamps are never read; everything else is proven.
        stamp = path.name in ("_CHECKPOINT_METADATA", "commit_success.txt")
        step, said = restore(folder)
        assert (step, len(said)) == ((20, 0) if stamp else (10, 1)), path
        assert read.pop() == str(step) and not read


# Orbax's own readers were never waited for, or find their event loop closed.
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
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
    gc.collect()  # its readers end here, and not in another test
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
    monkeypatch.setattr(checkpoint, "_SAVE_TIMEOUT_SECONDS", 20)
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
