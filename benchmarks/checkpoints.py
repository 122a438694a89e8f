"""How fast are checkpoints, beside the disk, and what memory do they need?

    .venv/bin/python benchmarks/checkpoints.py [--folder FOLDER] [--json FILE] [--quick]

A state of random floats on 8 simulated CPU devices, fsdp=2 x seq=4, in a folder of the
disk to be measured. `held` is the time for which `save` keeps the training loop, `save`
that until the checkpoint is committed, `restore` that until the arrays are there, files
not in the page cache. `write` and `read` are the same bytes in one file, written and
flushed, and read through a buffer: in the same round, and the table has the medians of
the rounds, of ratios too.

The devices' memory is the host's, so that nothing is copied while the loop is held; a
GPU's arrays come over PCIe then. Peaks are of a process of its own each, beyond what it
held before: the save's beyond the state, the restore's, onto seq=2 x tensor=4, beyond
the restored state. --quick: one small state. --compressed: by Zstandard, as Orbax
would, and no run does.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from ulysses_jax.mesh import make_mesh, simulate_cpu_devices
from ulysses_jax.training import array_files
from ulysses_jax.training.checkpoint import Checkpointer

_ARRAYS, _COLUMNS = 16, 1024
_BLOCK_BYTES = 1 << 22


def shapes(gibibytes: float, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Cut over (fsdp, seq) as a run's parameters are, and over tensor."""
    rows = round(gibibytes * 2**30) // (4 * _COLUMNS * _ARRAYS)
    sharding = NamedSharding(mesh, PartitionSpec("tensor", ("fsdp", "seq")))
    like = jax.ShapeDtypeStruct((rows, _COLUMNS), "float32", sharding=sharding)
    return {f"array_{number}": like for number in range(_ARRAYS)}


def made(abstract: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    like = next(iter(abstract.values()))

    def draw(key: jax.Array) -> jax.Array:
        return jax.random.normal(key, like.shape, like.dtype)

    draw = jax.jit(draw, out_shardings=like.sharding)
    keys = map(jax.random.key, range(len(abstract)))
    return jax.block_until_ready(dict(zip(abstract, map(draw, keys), strict=True)))


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def forget(path: Path) -> None:
    """Takes what is written of a file, or of a folder's, out of the page cache."""
    for each in [path] if path.is_file() else path.rglob("*"):
        if each.is_file():
            with open(each, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write(path: Path, state: dict[str, jax.Array]) -> None:
    """The bytes of all arrays, one behind the other, on the disk."""
    with open(path, "wb", buffering=0) as file:
        for array in state.values():
            for shard in array.addressable_shards:
                file.write(np.asarray(shard.data).data.cast("B"))
        os.fsync(file.fileno())


def read(path: Path) -> None:
    """Through one buffer: new memory costs more than the disk on some machines."""
    block = bytearray(_BLOCK_BYTES)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(block):
            pass


def one_round(place: Path, state: Any, abstract: Any) -> dict[str, float]:
    raw, saved, found = place / "raw", place / "checkpoints", {}
    # Whose pages are given back is whose successor gets them, at once; a virtual
    # machine may have to ask for new ones. So each of the four follows the same.
    for name in ("", "write"):
        found[name] = seconds(write, raw, state)
        forget(raw)
    del found[""]
    with Checkpointer(saved, interval_steps=1) as checkpointer:
        started = time.perf_counter()
        found["held"] = seconds(checkpointer.save, 1, state, {})
        checkpointer.wait()
        found["save"] = time.perf_counter() - started
    forget(saved)
    found["read"] = seconds(read, raw)
    forget(raw)
    with Checkpointer(saved, interval_steps=1) as checkpointer:
        found["restore"] = seconds(checkpointer.restore, abstract)
    shutil.rmtree(saved)
    raw.unlink()
    return found


def resident(field: str) -> int:
    """Bytes of this process: VmRSS, or VmHWM, its largest since `peak_of` began."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(field))


def peak_of(function: Callable[[], Any]) -> tuple[int, Any]:
    """By how many bytes the process grew at most, and the result, which counts."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    result = function()
    return resident("VmHWM") - before, result


def peak(what: str, folder: Path, gibibytes: float) -> int:
    """In a process of its own: of a save, or of a restore beyond its state."""
    simulate_cpu_devices(8)
    saves = what == "save"
    mesh = make_mesh(fsdp=2, seq=4) if saves else make_mesh(seq=2, tensor=4)
    abstract = shapes(gibibytes, mesh)
    made(shapes(1 / 1024, mesh))
    with Checkpointer(folder, interval_steps=1) as checkpointer:
        if not saves:
            grown, found = peak_of(lambda: checkpointer.restore(abstract))
            assert found is not None
            return grown - sum(x.nbytes for x in found[1].values())
        state = made(abstract)

        def save() -> None:
            checkpointer.save(1, state, {})
            checkpointer.wait()

        return peak_of(save)[0]


def rows(place: Path, sizes: list[float], rounds: int) -> list[dict[str, Any]]:
    mesh = make_mesh(fsdp=2, seq=4)
    found = []
    for size in sizes:
        abstract = shapes(size, mesh)
        state = made(abstract)
        taken = [one_round(place, state, abstract) for _ in range(rounds)]
        row: dict[str, Any] = {"gibibytes": size}
        for name in taken[0]:
            row[f"{name}_seconds"] = statistics.median(each[name] for each in taken)
        row["held_share"] = row["held_seconds"] / row["save_seconds"]
        for raw, ours in (("write", "save"), ("read", "restore")):
            ratios = [each[raw] / each[ours] for each in taken]
            row[f"{ours}_of_{raw}"] = statistics.median(ratios)
        del state
        for what in ("save", "restore"):
            words = [sys.executable, __file__, "--peak", what, str(size)]
            run = subprocess.run(
                [*words, "--folder", str(place / "checkpoints")],
                check=True,
                text=True,
                capture_output=True,
            )
            row[f"{what}_peak_bytes"] = int(run.stdout.split()[-1])
        row["largest_array_bytes"] = round(size * 2**30 / _ARRAYS)
        shutil.rmtree(place / "checkpoints")
        found.append(row)
    return found


def print_table(found: list[dict[str, Any]], rounds: int) -> None:
    table = Table(title=f"Checkpoints: seconds, medians of {rounds} rounds; MiB")
    names = ("GiB", "held", "save", "write", "restore", "read")
    shares = ("held / save", "write / save", "read / restore")
    for name in (*names, *shares, "save's peak", "restore's peak", "one array"):
        table.add_column(name, justify="right")
    for row in found:
        table.add_row(
            f"{row['gibibytes']:g}",
            *(f"{row[f'{name}_seconds']:.3f}" for name in names[1:]),
            f"{row['held_share']:.1%}",
            f"{row['save_of_write']:.0%}",
            f"{row['restore_of_read']:.0%}",
            *(
                f"{row[f'{name}_bytes'] / 2**20:,.0f}"
                for name in ("save_peak", "restore_peak", "largest_array")
            ),
        )
    Console(width=130).print(table)


def _compressing(proving: Any, **how: Any) -> Any:
    return proving(**how | {"use_compression": True})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows")
    parser.add_argument("--quick", action="store_true", help="one small state")
    parser.add_argument(
        "--folder", type=Path, default=Path("."), help="where to write (here)"
    )
    parser.add_argument("--compressed", action="store_true", help="by Zstandard")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compressed:
        array_files._Proving = partial(_compressing, array_files._Proving)
    if options.peak:
        print(peak(options.peak[0], options.folder, float(options.peak[1])))
        return
    simulate_cpu_devices(8)
    rounds = 3 if options.quick else 5
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        found = rows(Path(place), [0.25] if options.quick else [0.5, 1, 2], rounds)
    print_table(found, rounds)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
