"""Which of XLA's options for GPUs help this trainer, and by how much?

    .venv-plan/bin/python benchmarks/xla_options.py [--json FILE] [--quick]

Rows are Llama-3-8B at 131,072 tokens on H100, each compiled as the trainer does, which
lets two collectives be in flight, and with one option more in XLA_FLAGS: memory, what
is under compute in the schedule, and the predicted time that communication adds to a
step.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from ulysses_jax.config_file import load
from ulysses_jax.costs.targets import TARGETS
from ulysses_jax.plan.compile import PlanError
from ulysses_jax.plan.plan import Cluster, make_plan

CONFIG = Path(__file__).parents[1] / "configs" / "llama3_8b.yaml"
# One document a sequence; layers are recomputed from their inputs.
PLAIN = ["--data.no-mask-documents", "--memory.no-auto"]
ONE_SEQUENCE = ["--mesh.fsdp=1", "--training.batch-size=1"]
RUNS = {
    "8 GPUs": (1, []),
    "8 GPUs, 4 head chunks": (1, ["--memory.head-chunks=4"]),
    "64 GPUs": (8, []),
    "64 GPUs, 4 head chunks": (8, ["--memory.head-chunks=4"]),
    "64 GPUs, ring=8": (8, [*ONE_SEQUENCE, "--mesh.ring=8"]),
    "16 GPUs, seq=16": (
        2,
        [*ONE_SEQUENCE, "--mesh.seq=16", "--memory.head-chunks=1"],
    ),
    "16 GPUs, seq=16, 2 head chunks": (
        2,
        [*ONE_SEQUENCE, "--mesh.seq=16", "--memory.head-chunks=2"],
    ),
}
KINDS = ("all-to-all", "all-gather", "reduce-scatter")
GIB_BYTES = str(2**30)
IN_FLIGHT = "experimental_parallel_collective_overlap_limit"
OPTIONS = {
    "as the trainer": {},
    "one collective in flight": {IN_FLIGHT: "1"},
    "four": {IN_FLIGHT: "4"},
    "pipelined gathers": {"enable_pipelined_all_gather": "true"},
    "pipelined scatters": {"enable_pipelined_reduce_scatter": "true"},
    "double-buffered loops": {"enable_while_loop_double_buffering": "true"},
    "combined up to 1 GiB": {
        "all_gather_combine_threshold_bytes": GIB_BYTES,
        "reduce_scatter_combine_threshold_bytes": GIB_BYTES,
    },
    "analytical latencies": {"enable_analytical_latency_estimator": "true"},
    "starts as early as can be": {
        "experimental_collective_start_as_early_as_possible": "true"
    },
}


def row(run: str, option: str) -> dict[str, Any]:
    """Plans one run with one option."""
    hosts, overrides = RUNS[run]
    config = load(CONFIG, [f"--training.batch-size={hosts}", *PLAIN, *overrides])
    before = os.environ.get("XLA_FLAGS", "")
    flags = (f"--xla_gpu_{name}={value}" for name, value in OPTIONS[option].items())
    os.environ["XLA_FLAGS"] = " ".join([before, *flags])  # compiling is a child's work
    try:
        plan = make_plan(config, Cluster(TARGETS["h100"], hosts, 8))
    except PlanError as error:
        return {"run": run, "option": option, "error": str(error)}
    finally:
        os.environ["XLA_FLAGS"] = before
    shares = plan["overlap"]["fractions"]  # of a kind over its axes, one in each run
    return {
        "run": run,
        "option": option,
        "device_bytes": plan["memory"]["device_bytes"],
        "under_compute": {name.split(" over ")[0]: shares[name] for name in shares},
        "exposed_seconds": plan["predicted"]["exposed_communication_seconds"],
        "communication_seconds": plan["predicted"]["communication_seconds"],
        "step_seconds": plan["predicted"]["step_seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="8 GPUs, 2 options")
    args = parser.parse_args()
    wanted = [(run, option) for run in RUNS for option in OPTIONS]
    if args.quick:
        wanted = wanted[:2]
    rows = [
        row(*each)
        for each in track(wanted, transient=True, console=Console(stderr=True))
    ]
    table = Table(title="Llama-3-8B on H100; seconds are predicted", box=None)
    table.add_column("run")
    table.add_column("option")
    for header in ("GiB", "exchanged", "gathered", "scattered", "exposed s", "of s"):
        table.add_column(header, justify="right")
    for each in rows:
        if "error" in each:
            table.add_row(each["run"], each["option"], each["error"])
            continue
        table.add_row(
            each["run"],
            each["option"],
            f"{each['device_bytes'] / 2**30:.1f}",
            *(f"{each['under_compute'][kind]:.0%}" for kind in KINDS),
            f"{each['exposed_seconds']:.3f}",
            f"{each['step_seconds']:.2f}",
        )
    Console(width=110, highlight=False).print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
