"""The paper's own runs, planned: do they fit its hardware, and how fast would they be?

    .venv-plan/bin/python benchmarks/paper.py [--json FILE] [--quick] [--gpu a100-80]

Rows are DeepSpeed-Ulysses' (arXiv 2309.14509): GPT 1.2B with tokens growing with the
GPUs, one sequence over all of them; 7B on 32 and 30B on 64 A100, where a sequence spans
the 8 GPUs of a host, fsdp the hosts, and a step holds 32K tokens a GPU (the paper does
not state its batch). Fits, GiB and GB are read off compiled programs, times are
predicted, `theirs` is what the paper measured (TFLOP/s a GPU).
"""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from ulysses_jax.config_file import load
from ulysses_jax.plan.plan import Cluster, make_plan
from ulysses_jax.plan.targets import TARGETS

K = 1024
# Config, hosts of 8 GPUs, GPUs that a sequence spans, tokens, sequences a step, theirs.
ROWS = [("gpt_1b", n, 8 * n, 128 * K * n, 1, None) for n in (1, 2, 4, 8)]
LENGTHS = [8 * K, 16 * K, 32 * K, 64 * K, 128 * K, 256 * K]
ROWS += [
    (config, hosts, 8, tokens, hosts * 256 * K // tokens, theirs)
    for config, hosts, measured in (
        ("gpt_7b", 4, (159, 175, 178, 181, 176, 174)),
        ("gpt_30b", 8, (166, 157, 152, 147, 140, 134)),
    )
    for tokens, theirs in zip(LENGTHS, measured, strict=True)
]
CONFIGS = Path(__file__).parents[1] / "configs"


def row(
    name: str,
    hosts: int,
    seq: int,
    tokens: int,
    batch_size: int,
    theirs: int | None,
    *,
    gpu: str,
) -> dict[str, Any]:
    """Plans one run."""
    gpus = 8 * hosts
    config = load(
        CONFIGS / f"{name}.yaml",
        [
            f"--training.sequence-tokens={tokens}",
            f"--model.max-positions={tokens}",
            f"--training.batch-size={batch_size}",
            "--training.accumulation-steps=1",
            "--mesh.fsdp=-1",
            f"--mesh.seq={seq}",
        ],
    )
    plan = make_plan(config, Cluster(TARGETS[gpu], hosts, 8))
    memory, predicted = plan["memory"], plan["predicted"]
    exchange = next(r for r in plan["traffic"] if r["collective"] == "all-to-all")
    # Megatron's count, which the paper's figures are taken to be: recomputation
    # included, attention as if it were not causal.
    model = config.model
    width, layers = model.width, model.num_layers
    megatron = 96 * batch_size * tokens * layers * width**2
    megatron *= 1 + tokens / (6 * width) + model.vocab_size / (16 * layers * width)
    seconds = predicted["step_seconds"]
    return {
        "model": name,
        "gpus": gpus,
        "seq": seq,
        "tokens": tokens,
        "batch_size": batch_size,
        "fits": plan["fits"],
        "total_bytes": memory["device_bytes"] + memory["estimated_bytes"],
        "limit_bytes": memory["limit_bytes"],
        "exchange_bytes": exchange["bytes"],
        "exchange_ratio": exchange["ratio"],
        "step_seconds": seconds,
        "exposed_fraction": predicted["exposed_communication_seconds"] / seconds,
        "mfu": predicted["mfu"],
        "tflops_per_gpu": predicted["tflops_per_gpu"],
        "megatron_tflops_per_gpu": megatron / seconds / gpus / 1e12,
        "paper_tflops_per_gpu": theirs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="the first rows alone")
    parser.add_argument("--gpu", default="a100-40", choices=TARGETS)
    args = parser.parse_args()
    wanted = ROWS[:2] if args.quick else ROWS
    rows = [
        row(*each, gpu=args.gpu)
        for each in track(wanted, transient=True, console=Console(stderr=True))
    ]
    headers = "model GPUs seq tokens batch fits GiB exchanged ratio step exposed MFU"
    table = Table(title=f"{args.gpu}; times are predicted", box=None)
    for header in (*headers.split(), "TFLOP/s", "Megatron's count", "theirs"):
        table.add_column(header, justify="right")
    for each in rows:
        table.add_row(
            each["model"],
            str(each["gpus"]),
            str(each["seq"]),
            f"{each['tokens'] // K}K",
            str(each["batch_size"]),
            "yes" if each["fits"] else "no",
            f"{each['total_bytes'] / 2**30:.1f}",
            f"{each['exchange_bytes'] / 1e9:.2f} GB",
            f"{each['exchange_ratio']:.3f}",
            f"{each['step_seconds']:.2f} s",
            f"{each['exposed_fraction']:.0%}",
            f"{each['mfu']:.1%}",
            f"{each['tflops_per_gpu']:.0f}",
            f"{each['megatron_tflops_per_gpu']:.0f}",
            str(each["paper_tflops_per_gpu"] or ""),
        )
    Console(width=130, highlight=False).print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
