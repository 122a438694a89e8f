"""A long run whose processes are killed again and again: nothing lost, nothing left."""

import json
import subprocess
import sys

import numpy as np
import pytest
import yaml
from pod_cases import CONFIG, RECORD, ROOT, Pod, batches_in

from ulysses_jax.training.endings import LOST

pytestmark = pytest.mark.slow
WARM_UP = 0.5  # of the steps, in which pools and caches fill
MOST_SLOPE = 1e6 / 1000  # bytes a step
# What each process holds, as the system counts it, every tenth step. Python's table of
# interned strings doubles once, by 2 MB, whenever it happens to be full: it is made
# large enough before.
WATCH = """
import os, sys
[sys.intern(str(number) + " in the table") for number in range(200_000)]
def watch(number):
    if number % 10 == 0:
        pages = int(open("/proc/self/statm").read().split()[1])
        threads = len(os.listdir("/proc/self/task"))
        files = len(os.listdir("/proc/self/fd"))
        with open({path!r} + str(jax.process_index()), "a") as file:
            held = [number, pages * os.sysconf("SC_PAGE_SIZE"), threads, files]
            print(json.dumps(held), file=file)
"""


@pytest.fixture
def config_file(tmp_path):
    random = np.random.default_rng(0)
    letters = random.integers(33, 127, 40_000).astype(np.uint8).tobytes()
    (tmp_path / "text.txt").write_bytes(letters)
    path = tmp_path / "config.yaml"
    data = {"files": str(tmp_path / "text.txt"), "validation_fraction": 0.0}
    path.write_text(yaml.safe_dump(CONFIG | {"data": data}))
    return path


def started(config_file, folder, num_steps, record, num=2, every=None):
    watch = WATCH.format(path=f"{record}held-")
    every = every or max(10, num_steps // 40)
    return Pod(
        config_file,
        folder,
        num,
        silent=6,
        pause=0.0,
        prelude=RECORD.format(path=f"{record}rows-") + watch,
        at_step="record(number, batch); watch(number)",
        arguments=[
            f"--training.num-steps={num_steps}",
            f"--training.checkpoint-interval-steps={every}",
        ],
    )


@pytest.mark.parametrize("num_steps, num_kills", [(200, 3), (2000, 20)])
def test_killed_again_and_again(config_file, tmp_path, num_steps, num_kills):
    """Losses and samples are those of a run that nothing happened to."""
    with started(config_file, tmp_path / "whole", num_steps, tmp_path / "w-") as pod:
        assert pod.ended(0, 1, seconds=1500)[0] == [0, 0], pod.said(0)
        losses = pod.losses()
    random = np.random.default_rng(0)
    # Each is killed in a step further on, so that all starts get somewhere.
    steps = np.sort(random.integers(5, num_steps - 5, num_kills))
    for step, rank in zip(steps, random.integers(0, 2, num_kills), strict=True):
        with started(config_file, tmp_path / "run", num_steps, tmp_path / "k-") as pod:
            pod.until_step(rank, step, seconds=600)
            pod.send(rank, 9)
            codes, _ = pod.ended(1 - rank, seconds=120)
            assert codes == [LOST], pod.said(1 - rank)
    with started(config_file, tmp_path / "run", num_steps, tmp_path / "k-") as pod:
        assert pod.ended(0, 1, seconds=1500)[0] == [0, 0], pod.said(0)
        assert pod.losses() == losses
    whole, killed = (batches_in(tmp_path / f"{name}-rows-") for name in "wk")
    assert sorted(whole) == sorted(killed) == list(range(1, num_steps + 1))
    for step, batch in whole.items():
        np.testing.assert_array_equal(killed[step], batch)
    for rank in range(2):
        held(tmp_path / f"w-held-{rank}", num_steps)


def held(path, num_steps):
    """Bytes a step, when caches are full; threads and files are as many as before."""
    lines = path.read_text().splitlines()
    found = np.array([json.loads(line) for line in lines])
    number, resident, threads, files = found[found[:, 0] > WARM_UP * num_steps].T
    slope = np.polyfit(number, resident, 1)[0]
    print(
        f"{path.name}: {resident[0] / 1e6:.1f} to {resident[-1] / 1e6:.1f} MB, "
        f"{slope / 1e3:.3f} MB a 1,000 steps; threads {threads[0]} to {threads[-1]} "
        f"({threads.min()} to {threads.max()}), files {files[0]} to {files[-1]} "
        f"({files.min()} to {files.max()})"
    )
    # A save that is under way has some of its own.
    assert threads[-1] <= threads[: len(threads) // 2].max()
    assert files[-1] <= files[: len(files) // 2].max()
    return slope


@pytest.mark.parametrize("num", [1, 2], ids=["alone", "two"])
def test_memory_is_flat(config_file, tmp_path, num):
    """With a save every 50 steps."""
    num_steps = 4000  # Python and glibc take a megabyte at once: fewer show no slope
    options = {"num": num, "every": 50}
    run = started(config_file, tmp_path / "run", num_steps, tmp_path / "m-", **options)
    with run as pod:
        assert pod.ended(*range(num), seconds=3000)[0] == [0] * num, pod.said(0)
    for rank in range(num):
        assert held(tmp_path / f"m-held-{rank}", num_steps) < MOST_SLOPE


AGAIN = """
import gc, os, sys
import jax
from ulysses_jax.training import train
from ulysses_jax.config_file import load
import dataclasses
config = load(sys.argv[1])
for call in range(10):
    run = dataclasses.replace(config.run, folder=f"{sys.argv[2]}/{call}")
    train(dataclasses.replace(config, run=run))
    gc.collect()
    print("held", len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")))
"""


def test_ten_runs_in_one_process(config_file, tmp_path):
    config = yaml.safe_load(config_file.read_text())
    config["training"] |= {"num_steps": 3, "checkpoint_interval_steps": 1}
    config_file.write_text(yaml.safe_dump(config))
    arguments = [sys.executable, "-c", AGAIN, str(config_file), str(tmp_path)]
    ended = subprocess.run(
        arguments, capture_output=True, text=True, timeout=500, cwd=ROOT
    )
    assert ended.returncode == 0, ended.stderr
    held = [line.split()[1:] for line in ended.stdout.splitlines() if "held" in line]
    threads, files = np.array(held, int).T
    print(f"threads {threads.tolist()}, files {files.tolist()}")
    assert len(threads) == 10
    assert threads[-1] <= threads[:3].max() and files[-1] <= files[:3].max()
