"""What a device sends a layer, by strategy: does the program send the formula's bytes?

    .venv/bin/python benchmarks/traffic.py [--json FILE] [--plot FILE.png] [--quick]

Compiles the trainer's own step for a small model on simulated CPU devices, and reads
what a device sends over `ring` and `seq`, forward and backward, off the program. Two
groups of devices (fsdp) train in parallel, so that parameters go over other axes. A
sequence lies over 2, 4 and 8 devices: as long as at first (strong), or growing with
them (weak). All-reduces, of norms' gradients and the loss, are left out.
"""

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AxisType
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ulysses_jax import make_mesh
from ulysses_jax.complete import complete
from ulysses_jax.config import Config
from ulysses_jax.config_file import from_dict
from ulysses_jax.costs.collectives import find_collectives
from ulysses_jax.costs.hlo import parse
from ulysses_jax.mesh import simulate_cpu_devices
from ulysses_jax.parallel.bytes import received_bytes, total_bytes
from ulysses_jax.placement import place
from ulysses_jax.plan.compile import compile_on
from ulysses_jax.strategies import STRATEGIES, Strategy

DEVICES = (2, 4, 8)
HEADS, HEAD_SIZE, LAYERS = 32, 4, 2
WIDTH = HEADS * HEAD_SIZE
GROUPS = (1, 8)  # query heads a key/value head: 32 of these, and 4, fewer than devices
TOKENS = {"strong": lambda devices: 256, "weak": lambda devices: 64 * devices}
# Machine code that never runs need not be fast.
UNOPTIMISED = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


def degrees_of(strategy: Strategy, devices: int, group: int) -> tuple[int, int] | None:
    """(ring, seq) of a strategy on so many devices; None: it does not run there."""
    if strategy == "ring":
        return devices, 1
    if strategy == "hybrid":
        return (2, devices // 2) if devices > 2 else None
    if strategy == "megatron" and HEADS // group % devices:
        return None
    return 1, devices


@functools.cache
def sent_bytes(strategy: Strategy, devices: int, tokens: int, group: int) -> float:
    """Of a device, a layer and sequence, forward and backward, as compiled."""
    degrees = degrees_of(strategy, devices, group)
    assert degrees is not None
    ring, seq = degrees
    values = {
        "model": {
            "vocab_size": 64,
            "width": WIDTH,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "num_kv_heads": HEADS // group,
            "feed_forward_width": WIDTH,
            "strategy": strategy,
            "compute_dtype": "float32",  # a CPU has no other: XLA would widen it
        },
        "data": {"mask_documents": False},
        "training": {"batch_size": 2, "sequence_tokens": tokens},
        "memory": {"remat": "none"},  # what is recomputed is sent again
    }
    mesh = make_mesh(
        fsdp=2,
        ring=ring,
        seq=seq,
        devices=jax.devices()[: 2 * devices],
        axis_type=AxisType.Explicit,
    )
    config = complete(from_dict(Config, values), name="traffic")
    config = place(config, dict(mesh.shape))
    program = compile_on(config, mesh, compiler_options=UNOPTIMISED)
    found = find_collectives(parse(program.text), program.degrees, 2 * devices)
    total = sum(
        each.count * each.sent_bytes
        for each in found
        if each.kind != "all-reduce" and set(each.axes.split("+")) <= {"ring", "seq"}
    )
    return total / LAYERS


def formula_bytes(
    strategy: Strategy, devices: int, tokens: int, group: int
) -> float | None:
    """By `parallel.bytes.received_bytes`; None: the strategy does not run there."""
    degrees = degrees_of(strategy, devices, group)
    if degrees is None:
        return None
    ring, seq = degrees
    received = received_bytes(
        strategy,
        tokens=tokens,
        num_heads=HEADS,
        num_kv_heads=HEADS // group,
        head_size=HEAD_SIZE,
        itemsize=4,
        ring=ring,
        seq=seq,
        width=WIDTH,
    )
    return total_bytes(received)


def row(
    strategy: Strategy, devices: int, scaling: str, group: int
) -> dict[str, Any] | None:
    """One point; None where the strategy does not run."""
    tokens = TOKENS[scaling](devices)
    formula = formula_bytes(strategy, devices, tokens, group)
    if formula is None:
        return None
    found = sent_bytes(strategy, devices, tokens, group)
    return {
        "strategy": strategy,
        "scaling": scaling,
        "group": group,
        "devices": devices,
        "tokens": tokens,
        "bytes": found,
        "formula_bytes": formula,
        "ratio": found / formula,
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Formulas as lines, to 32 devices; programs as points."""
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(GROUPS), len(TOKENS), sharex=True, sharey=True)
    titles = {"strong": "a sequence of 256 tokens", "weak": "64 tokens a device"}
    for group, line in zip(GROUPS, panels, strict=True):
        for (scaling, tokens), panel in zip(TOKENS.items(), line, strict=True):
            for index, strategy in enumerate(STRATEGIES):
                counts = [2, 4, 8, 16, 32]
                line_bytes = [
                    formula_bytes(strategy, n, tokens(n), group) for n in counts
                ]
                where = strategy, scaling, group
                points = [
                    each
                    for each in rows
                    if (each["strategy"], each["scaling"], each["group"]) == where
                ]
                panel.plot(
                    counts,
                    [float("nan") if n is None else n / 1e3 for n in line_bytes],
                    color=f"C{index}",
                )
                panel.scatter(
                    [each["devices"] for each in points],
                    [each["bytes"] / 1e3 for each in points],
                    color=f"C{index}",
                    label=strategy,
                )
            kv_heads = HEADS // group
            panel.set_title(f"{titles[scaling]}; {HEADS} heads, {kv_heads} KV heads")
            panel.set_xscale("log", base=2)
            panel.set_yscale("log", base=2)
            panel.set_xticks((2, 4, 8, 16, 32), ["2", "4", "8", "16", "32"])
            panel.grid(alpha=0.3)
    for panel in panels[-1]:
        panel.set_xlabel("devices that a sequence lies over")
    for panel in panels[:, 0]:
        panel.set_ylabel("kB a device sends a layer")
        panel.yaxis.set_major_formatter("{x:g}")
    panels[0, 0].legend(loc="lower left")
    figure.suptitle("Points: compiled, forward and backward. Lines: formulas")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--quick", action="store_true", help="2 and 4 devices, weak")
    args = parser.parse_args()
    devices = DEVICES[:2] if args.quick else DEVICES
    scalings = ["weak"] if args.quick else list(TOKENS)
    simulate_cpu_devices(2 * devices[-1])
    wanted: list[tuple[Strategy, int, str, int]] = [
        (strategy, num, scaling, group)
        for scaling in scalings
        for group in GROUPS
        for strategy in STRATEGIES
        for num in devices
    ]
    console = Console(stderr=True)
    found = [row(*each) for each in track(wanted, transient=True, console=console)]
    rows = [each for each in found if each is not None]
    title = "kB a device sends a layer, forward and backward, float32; / formula"
    table = Table(title=title, box=None)
    for header in ("tokens", "heads a KV head", "strategy"):
        table.add_column(header)
    for num in devices:
        table.add_column(f"{num} devices", justify="right")
    for at in range(0, len(found), len(devices)):
        strategy, _, scaling, group = wanted[at]
        table.add_row(
            scaling,
            str(group),
            strategy,
            *(
                f"{each['bytes'] / 1e3:,.1f} / {each['ratio']:.3f}" if each else "-"
                for each in found[at : at + len(devices)]
            ),
        )
    Console(width=130, highlight=False).print(table)
    if args.json:
        args.json.write_text(json.dumps({"rows": rows}, indent=1))
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
