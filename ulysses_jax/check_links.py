"""The links of a cluster by themselves: `python -m ulysses_jax.check_links`.

    python -m ulysses_jax.check_links --mesh.data 2 --mesh.seq 8

On a pod every process runs the same line, as with `train.py`. For each axis of the mesh
it times what strategies send over it, by size, beside what the plan predicts.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ulysses_jax.costs.collectives import share_between_hosts
from ulysses_jax.costs.predict import link_seconds
from ulysses_jax.costs.targets import target_of
from ulysses_jax.inference.opening import (
    add_mesh_options,
    mesh_of,
    say,
    write_whole,
)
from ulysses_jax.mesh import devices_per_host
from ulysses_jax.training.endings import ends_in_words, ends_with_the_others

PROGRAM = "python -m ulysses_jax.check_links"
KINDS = ("all-to-all", "all-gather", "collective-permute")
MIB = 2**20


def main(argv: Sequence[str] | None = None) -> None:
    """Raises SystemExit: with code 2 for an error in words."""
    options = _parser().parse_args(argv)
    with ends_in_words(PROGRAM), mesh_of(options) as mesh, ends_with_the_others():
        if min(options.mib) < 1 or options.rounds < 1:
            raise ValueError("--mib and --rounds: give 1 or more")
        if all(degree == 1 for degree in mesh.shape.values()):
            raise ValueError(
                "the mesh has 1 device, and no links: give an axis more devices, such "
                "as --mesh.seq 8"
            )
        header = ("axis", "devices", "sends", "MiB", "ms", "GB/s", "plan's ms")
        say("| " + " | ".join(header) + " |")
        say("| --- | ---: | --- | ---: | ---: | ---: | ---: |")
        rows = []
        for row in measured(mesh, options.mib, options.rounds):
            rows.append(row)
            planned = row["planned_seconds"]
            ms = "" if planned is None else f"{1e3 * planned:.3f}"
            say(
                f"| {row['axis']} | {row['devices']} | {row['kind']} | {row['mib']} | "
                f"{1e3 * row['seconds']:.3f} | "
                f"{row['bytes_per_second'] / 1e9:.2f} | {ms} |"
            )
        write_whole(options.json, (json.dumps(rows, indent=1) + "\n").encode())


def measured(mesh: Mesh, sizes_mib: Sequence[int], rounds: int) -> Iterator[dict]:
    """A row an axis of two devices or more, kind and size.

    Args:
      mesh: every device of it sends at the same time, in groups along the axis.
      sizes_mib: of what a device holds of the larger of input and output.
      rounds: the time of a row is the median of so many.

    Returns:
      Rows of `axis, devices, kind, mib, seconds, bytes_per_second`, by what a device
      sends (that of a part it keeps is not counted), and `planned_seconds`, None on
      devices that the plan does not know.
    """
    target, on_host = target_of(mesh.devices.flat[0]), devices_per_host()
    for axis, devices in mesh.shape.items():
        if devices == 1:
            continue
        for kind in KINDS:
            for mib in sizes_mib:
                call, sent = _program(mesh, axis, kind, mib * MIB)
                seconds = _median(call, rounds)
                planned = None
                if target is not None:
                    hosts = _hosts(mesh, axis, on_host)
                    share = share_between_hosts(kind, devices, hosts)
                    between = sent * share
                    inside = sent if hosts == 1 else sent - between
                    planned = link_seconds(target, inside, between)
                yield {
                    "axis": axis,
                    "devices": devices,
                    "kind": kind,
                    "mib": mib,
                    "seconds": seconds,
                    "bytes_per_second": sent / seconds,
                    "planned_seconds": planned,
                }


def _program(
    mesh: Mesh, axis: str, kind: str, num_bytes: int
) -> tuple[Callable[[], Any], float]:
    """What runs it once, and the bytes that a device sends."""
    devices = mesh.shape[axis]
    elements = max(num_bytes // 2 // devices, 1) * devices
    rest = (devices - 1) / devices * 2 * elements

    def send(x: jax.Array) -> jax.Array:
        if kind == "all-to-all":
            blocks = x.reshape(devices, -1)
            return jax.lax.all_to_all(blocks, axis, 0, 0, tiled=True).reshape(-1)
        if kind == "all-gather":
            part = x[: elements // devices]
            return jax.lax.all_gather(part, axis, tiled=True)
        ring = [(i, (i + 1) % devices) for i in range(devices)]
        return jax.lax.ppermute(x, axis, ring)

    spec = P(mesh.axis_names)
    # Made where it lies: the whole of it, of all devices, has room on none.
    ones = partial(jnp.ones, elements * mesh.size, jnp.bfloat16)
    x = jax.jit(ones, out_shardings=NamedSharding(mesh, spec))()
    run = jax.jit(
        jax.shard_map(send, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    )
    run = run.lower(x).compile()
    sent = 2.0 * elements if kind == "collective-permute" else rest
    return partial(run, x), sent


def _median(call: Callable[[], Any], rounds: int) -> float:
    jax.block_until_ready(call())
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _hosts(mesh: Mesh, axis: str, devices_on_host: int) -> int:
    """That a group along the axis spans; devices lie host by host."""
    names = list(mesh.shape)
    inside = 1
    for name in names[names.index(axis) + 1 :]:
        inside *= mesh.shape[name]
    on_host = max(1, devices_on_host // inside)
    return max(1, -(-mesh.shape[axis] // on_host))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    add_mesh_options(parser)
    add = parser.add_argument
    add("--mib", type=int, nargs="+", default=[1, 16, 256], help="sizes a device")
    add("--rounds", type=int, default=10, help="a time is the median of so many")
    add("--json", type=Path, metavar="FILE", help="write the rows")
    return parser


if __name__ == "__main__":
    main()
