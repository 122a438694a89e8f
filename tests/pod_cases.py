"""Processes of one run, for real: started, watched and ended by a test."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import yaml

from ulysses_jax.training.metrics import read_rows

ROOT = Path(__file__).resolve().parents[1]
STEPS = 12
CONFIG = {
    "run": {"simulated_cpu_devices": 2},
    "model": {
        "vocab_size": 264,
        "width": 16,
        "num_layers": 1,
        "num_heads": 4,
        "feed_forward_width": 16,
        "compute_dtype": "float32",
    },
    "training": {
        "num_steps": STEPS,
        "batch_size": 2,
        "sequence_tokens": 64,
        "validation_batches": 0,
        "checkpoint_interval_steps": 4,
    },
    "mesh": {"seq": -1},
    "quiet": True,
}
# A step takes a quarter of a second or more, and says on each process that it begins.
DRIVER = """
import sys, time
sys.path.insert(0, {root!r})
import jax
from ulysses_jax.training import endings, loop as story, phases
endings._SILENT_SECONDS = {silent}
batches = story.training_batches
def slow(*args, **options):
    steps = batches(*args, **options)
    for number, batch in enumerate(steps, options["start_step"] + 1):
        time.sleep({pause})
        print("step", number, flush=True)
        {at_step}
        yield batch
    steps.close()
story.training_batches = slow
{prelude}
from ulysses_jax.train import start
print("starts", flush=True)
start("train.py")
"""


def waits_at(step):
    """A step that lasts until something happens, so that it does happen in it."""
    return f"time.sleep(60 * (number == {step}))"


# What `record(number, batch)` needs: each process writes the tokens that its own
# devices hold of a step's batch.
RECORD = """
import json
def record(number, batch):
    with open({path!r} + str(jax.process_index()), "a") as file:
        tokens = batch["tokens"]
        for shard in tokens.addressable_shards:
            box = [p.indices(n)[:2] for p, n in zip(shard.index, tokens.shape)]
            print(json.dumps([number, box, shard.data.tolist()]), file=file, flush=True)
"""


def batches_in(record):
    """The tokens of each step's whole batch, from what processes wrote of it; of a step
    that was taken again all have the same."""
    found = {}
    for path in sorted(record.parent.glob(f"{record.name}*")):
        for line in path.read_text().splitlines():
            try:
                step, box, tokens = json.loads(line)
            except ValueError:
                continue  # it was killed meanwhile
            found.setdefault(step, []).append((box, np.array(tokens)))
    whole = {}
    for step, parts in found.items():
        shape = [max(box[dim][1] for box, _ in parts) for dim in range(3)]
        whole[step] = np.full(shape, -1)
        for box, tokens in parts:
            here = whole[step][tuple(slice(*bounds) for bounds in box)]
            assert ((here == -1) | (here == tokens)).all()
            here[:] = tokens
    return whole


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class Pod:
    """Processes of one run.

    Args:
      num: of them; or the number that each says it is, and `of` how many it knows of.
      silent: seconds after which one is lost.
      pause: seconds that a step takes at least.
      at_step: what each does before it takes step `number`.
      prelude: what each does before it starts.
      arguments: of all of them.
      folders: that each starts in; its config may name files from there.
    """

    def __init__(
        self,
        config_file,
        folder,
        num=2,
        *,
        of=None,
        silent=8,
        pause=0.25,
        at_step="",
        prelude="",
        arguments=(),
        folders=None,
        port=None,
    ):
        ranks = range(num) if isinstance(num, int) else num
        of = [len(ranks)] * len(ranks) if of is None else of
        port = port or free_port()
        driver = DRIVER.format(
            root=str(ROOT),
            silent=silent,
            pause=pause,
            at_step=at_step,
            prelude=prelude,
        )
        outside = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
        self.folder = folder
        name = f"{folder.name}-{port}"
        self.outputs = [folder.with_name(f"{name}-{i}.txt") for i in range(len(ranks))]
        self.files = [output.open("w") for output in self.outputs]
        self.processes = [
            subprocess.Popen(
                [
                    *(sys.executable, "-c", driver, "--config", str(config_file)),
                    *("--run.folder", str(folder)),
                    f"--distributed.coordinator=127.0.0.1:{port}",
                    f"--distributed.num-processes={of[place]}",
                    f"--distributed.process-id={rank}",
                    *arguments,
                ],
                env=outside | {"JAX_PLATFORMS": "cpu"},
                cwd=None if folders is None else folders[place],
                stdout=self.files[place],
                stderr=subprocess.STDOUT,
            )
            for place, rank in enumerate(ranks)
        ]

    def __len__(self):
        return len(self.processes)

    def said(self, rank):
        return self.outputs[rank].read_text(errors="replace")

    def until(self, rank, text, seconds=150):
        end = time.monotonic() + seconds
        while text not in self.said(rank):
            assert self.processes[rank].poll() is None, self.said(rank)
            assert time.monotonic() < end, self.said(rank)
            time.sleep(0.02)

    def until_step(self, rank, step, seconds):
        """Until it takes this step, or has taken it."""
        end, taken = time.monotonic() + seconds, 0
        while taken < step:
            assert self.processes[rank].poll() is None, self.said(rank)
            assert time.monotonic() < end, self.said(rank)
            time.sleep(0.02)
            *_, taken = [
                0,
                *map(int, re.findall(r"^step (\d+)$", self.said(rank), re.M)),
            ]

    def all_start(self):
        """Their imports are over, which take long on cores at which others work."""
        for rank in range(len(self)):
            self.until(rank, "starts\n")

    def send(self, rank, number):
        os.kill(self.processes[rank].pid, number)

    def ended(self, *ranks, seconds):
        """Their exit codes, and how long the last one took."""
        started = time.monotonic()
        codes = [self.processes[rank].wait(seconds) for rank in ranks]
        return codes, time.monotonic() - started

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()
        for file in self.files:
            file.close()

    def all_end(self, code, seconds):
        """All end with the code, so long after they started, and leave no process."""
        self.all_start()
        codes, took = self.ended(*range(len(self)), seconds=120)
        said = [self.said(rank) for rank in range(len(self))]
        assert codes == [code] * len(self), said
        assert took < seconds, said
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                assert str(self.folder).encode() not in path.read_bytes()
        return said

    def losses(self):
        rows = read_rows(self.folder / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pods")
    words = np.random.default_rng(0).choice(["alpha", "beta", "gamma"], 4000)
    (folder / "text.txt").write_text("\n".join(words))
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(CONFIG | {"data": {"files": str(folder / "*.txt")}}))
    return path
