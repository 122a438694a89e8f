"""The paper's own runs, planned: Ulysses beside Megatron, and Ulysses as GPUs grow.

    .venv-plan/bin/python benchmarks/paper.py [--json FILE] [--plot FILE.png] [--quick]
    .venv-plan/bin/python benchmarks/paper.py --sparse --gpu h100 [--json FILE]

DeepSpeed-Ulysses' runs (arXiv 2309.14509). Headline: 7B on 32 and 30B on 64 A100, from
8K tokens to the longest that each strategy can train, on its fastest mesh that fits.
Ulysses has ZeRO-3 over all GPUs; Megatron-LM's sequence parallelism cuts parameters
over the GPUs of a sequence alone. Both recompute each layer from its input, tile the
feed-forward and the loss, and offload nothing. Scaling: 1.2B, tokens growing with the
GPUs. Fits, lengths and bytes are read off compiled programs, times are predicted,
`theirs` is what the paper measured (TFLOP/s a GPU). `--sparse`: Ulysses over 8 GPUs
with block-sparse attention beside dense, 8K to 256K tokens; an A100 has no kernel for
it, an H100 has, with Python 3.12 or newer.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from ulysses_jax.config import Config
from ulysses_jax.config_file import load
from ulysses_jax.costs.targets import TARGETS
from ulysses_jax.costs.traffic import attention_bytes
from ulysses_jax.plan.longest import longest
from ulysses_jax.plan.plan import Cluster, make_plan, placed_on, with_tokens

K = 1024
GIB = 2**30
CONFIGS = Path(__file__).parents[1] / "configs"
STRATEGIES = ("ulysses", "megatron")
# Hosts of 8 GPUs; what the paper measured from 8K tokens on, as long as memory lasted.
HEADLINE: dict[str, tuple[int, dict[str, tuple[int, ...]]]] = {
    "gpt_7b": (
        4,
        {
            "ulysses": (159, 175, 178, 181, 176, 174),
            "megatron": (106, 143, 164, 165, 158),
        },
    ),
    "gpt_30b": (
        8,
        {
            "ulysses": (166, 157, 152, 147, 140, 134),
            "megatron": (45, 67, 86, 104),
        },
    ),
}
TOKENS_A_GPU = 32 * K  # a step; the paper does not state its batch
# A learned table of a million positions would outgrow the model.
OPTIONS = ("--model.positions=rope", "--memory.mlp-tile-tokens=8192")
# Blocks of 512 tokens see their own group of 8, and the last block of each before.
SPARSE = (
    "--model.sparse=fixed",
    "--model.sparse-block-tokens=512",
    "--model.sparse-local-blocks=8",
)
# What the paper's runs had not, for both alike.
OFFLOAD = ("--memory.offload", "inputs")


def run(
    name: str,
    strategy: str,
    cluster: Cluster,
    seq: int,
    tokens: int,
    sequences: int,
    steps: int = 1,
    more: tuple[str, ...] = (),
) -> Config:
    """A run of so many sequences a step, each over `seq` GPUs."""
    rows = cluster.num_devices // seq
    zero, copies = (rows, 1) if strategy == "ulysses" else (1, rows)
    arguments = (
        f"--model.strategy={strategy}",
        f"--training.sequence-tokens={tokens}",
        f"--training.batch-size={sequences}",
        f"--training.accumulation-steps={steps}",
        f"--mesh.data={copies}",
        f"--mesh.fsdp={zero}",
        f"--mesh.seq={seq}",
    )
    return load(CONFIGS / f"{name}.yaml", [*arguments, *OPTIONS, *more])


def row(name: str, config: Config, cluster: Cluster) -> dict[str, Any]:
    """Plans one run."""
    plan = make_plan(config, cluster)
    config = placed_on(config, cluster)
    memory, predicted = plan["memory"], plan["predicted"]
    formulas = attention_bytes(config)
    # Megatron's count, which the paper's figures are taken to be: recomputation
    # included, attention as if it were not causal.
    model, tokens, batch = config.model, plan["tokens"], plan["batch_size"]
    width, layers = model.width, model.num_layers
    megatron = 96 * batch * tokens * layers * width**2
    megatron *= 1 + tokens / (6 * width) + model.vocab_size / (16 * layers * width)
    seconds = predicted["step_seconds"]
    return {
        "model": name,
        "strategy": plan["strategy"],
        "gpus": cluster.num_devices,
        "seq": config.mesh.seq,
        "tokens": tokens,
        "batch_size": batch,
        "accumulation_steps": config.training.accumulation_steps,
        "fits": plan["fits"],
        "total_bytes": memory["device_bytes"] + memory["estimated_bytes"],
        "limit_bytes": memory["limit_bytes"],
        # That a GPU sends for attention, and for Megatron's feed-forward.
        "activation_bytes": sum(formulas.values()),
        "traffic_ratio": max(
            (
                each["ratio"]
                for each in plan["traffic"]
                if (each["collective"], each["axis"]) in formulas
            ),
            default=None,
        ),
        "pairs_fraction": plan["attention"][0]["pairs_fraction"],
        "step_seconds": seconds,
        "exposed_fraction": predicted["exposed_communication_seconds"] / seconds,
        "mfu": predicted["mfu"],
        "tflops_per_gpu": predicted["tflops_per_gpu"],
        "megatron_tflops_per_gpu": megatron / seconds / cluster.num_devices / 1e12,
    }


def fastest(
    name: str,
    strategy: str,
    cluster: Cluster,
    tokens: int,
    steps: dict[int, int],
    more: tuple[str, ...] = (),
) -> dict[str, Any] | None:
    """The fastest row that fits, over the degrees of `seq`; None: none does.

    Args:
      steps: by degree, the fewest accumulation steps that may fit. Raised to those that
        do; a degree that does not fit one sequence at a time is removed. So it serves
        the next length, whose steps hold as many tokens.
    """
    found = []
    for seq in tuple(steps):
        in_turn = max(seq * TOKENS_A_GPU // tokens, 1)  # at most, in a group of GPUs
        sequences = in_turn * cluster.num_devices // seq
        num_steps = min(steps.pop(seq), in_turn)
        while num_steps <= in_turn:
            config = run(
                name, strategy, cluster, seq, tokens, sequences, num_steps, more
            )
            if (candidate := row(name, config, cluster))["fits"]:
                found.append(candidate)
                steps[seq] = num_steps
                break
            num_steps *= 2
    return max(found, key=lambda each: each["tflops_per_gpu"], default=None)


def ladder(
    name: str,
    strategy: str,
    cluster: Cluster,
    most: int | None = None,
    more: tuple[str, ...] = (),
    degrees: tuple[int, ...] = (8, 16, 32, 64),
) -> list[dict[str, Any]]:
    """The fastest row of each length, doubling from 8K tokens while any fits."""
    heads = load(CONFIGS / f"{name}.yaml").model.num_heads
    degrees = tuple(n for n in degrees if n <= min(heads, cluster.num_devices))
    steps = dict.fromkeys(degrees, 1)
    measured = HEADLINE[name][1][strategy]
    rows = []
    for i in itertools.count() if most is None else range(most):
        if not (found := fastest(name, strategy, cluster, 8 * K << i, steps, more)):
            break
        theirs = measured[i] if i < len(measured) else None
        rows.append(found | {"paper_tflops_per_gpu": theirs})
    return rows


def sparse_table(name: str, cluster: Cluster, most: int) -> list[dict[str, Any]]:
    """Rows of the lengths that the paper's sparse runs have, and of dense attention."""
    rows, made = [], Table(title=f"{name}; times are predicted", box=None)
    for header in "attention tokens seq pairs GiB".split():
        made.add_column(header, justify="right")
    for header in ("step of a sequence", "times", "TFLOP/s"):
        made.add_column(header, justify="right")
    sequences: dict[int, float] = {}  # seconds of dense attention's
    for attention, more in (("dense", ()), ("block-sparse", SPARSE)):
        for each in ladder(name, "ulysses", cluster, most, more, degrees=(8,)):
            tokens, seconds = each["tokens"], each["step_seconds"] / each["batch_size"]
            made.add_row(
                attention,
                f"{tokens // K:,}K",
                str(each["seq"]),
                f"{each['pairs_fraction']:.1%}",
                f"{each['total_bytes'] / GIB:.1f}",
                f"{seconds:.3f} s",
                f"{sequences.setdefault(tokens, seconds) / seconds:.2f}",
                f"{each['tflops_per_gpu']:.0f}",
            )
            # The paper's figures are of dense attention on A100.
            rows.append(each | {"attention": attention, "paper_tflops_per_gpu": None})
    Console(width=150, highlight=False).print(made)
    return rows


def limit(
    name: str, strategy: str, cluster: Cluster, more: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The row of the longest sequence that fits; it lies over all GPUs."""
    devices = cluster.num_devices
    config = run(name, strategy, cluster, devices, 1024 * K, 1, more=more)
    tokens = longest(config, cluster)["longest_tokens"]
    return row(name, with_tokens(config, tokens), cluster)


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    made = Table(title=title, box=None)
    headers = (
        "strategy tokens fits GiB seq batch steps GB/step ratio step exposed MFU "
        "TFLOP/s theirs"
    )
    for header in (*headers.split(), "Megatron's count"):
        made.add_column(header, justify="right")
    for each in rows:
        made.add_row(
            each["strategy"],
            f"{each['tokens'] // K:,}K",
            "yes" if each["fits"] else "no",
            f"{each['total_bytes'] / GIB:.1f}",
            str(each["seq"]),
            str(each["batch_size"]),
            str(each["accumulation_steps"]),
            f"{each['activation_bytes'] / 1e9:.1f}",
            f"{each['traffic_ratio'] or 0:.3f}",
            f"{each['step_seconds']:.1f} s",
            f"{each['exposed_fraction']:.0%}",
            f"{each['mfu']:.1%}",
            f"{each['tflops_per_gpu']:.0f}",
            str(each.get("paper_tflops_per_gpu") or ""),
            f"{each['megatron_tflops_per_gpu']:.0f}",
        )
    return made


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Predicted TFLOP/s as lines that end at the limit; theirs as points."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(HEADLINE), sharex=True, sharey=True)
    for panel, (name, (hosts, measured)) in zip(panels, HEADLINE.items(), strict=True):
        for index, strategy in enumerate(STRATEGIES):
            mine = [e for e in rows if (e["model"], e["strategy"]) == (name, strategy)]
            mine = sorted(mine, key=lambda each: each["tokens"])
            x = [each["tokens"] / K for each in mine]
            y = [each["tflops_per_gpu"] for each in mine]
            color = f"C{index}"
            label = f"{strategy}, planned"
            panel.plot(x, y, color=color, label=label)
            panel.plot(x[-1:], y[-1:], "|", color=color, markersize=14)
            theirs = measured[strategy]
            x = [8 << i for i in range(len(theirs))]
            label = f"{strategy}, the paper's"
            panel.plot(x, theirs, "o", color=color, mfc="none", label=label)
        panel.set_title(f"{name.removeprefix('gpt_').upper()} on {8 * hosts} A100")
        panel.set_xscale("log", base=2)
        ticks = [8, 32, 128, 512, 2048]
        panel.set_xticks(ticks, ["8K", "32K", "128K", "512K", "2M"])
        panel.set_ylim(0)
        panel.set_xlabel("tokens of a sequence")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("TFLOP/s a GPU")
    panels[0].legend(loc="lower right")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--quick", action="store_true", help="8K tokens, 7B; 1.2B on 8")
    parser.add_argument("--sparse", action="store_true", help="block-sparse attention")
    parser.add_argument("--gpu", default="a100-40", choices=TARGETS)
    args = parser.parse_args()
    console = Console(width=150, highlight=False)
    target = TARGETS[args.gpu]
    rows: list[dict[str, Any]] = []
    for name, (hosts, _) in list(HEADLINE.items())[: 1 if args.quick else None]:
        cluster = Cluster(target, hosts, 8, timeout_seconds=3600)
        if args.sparse:
            rows += sparse_table(name, cluster, 1 if args.quick else 6)
            continue
        found = []
        for strategy in STRATEGIES:
            found += ladder(name, strategy, cluster, 1 if args.quick else None)
            if not args.quick:
                found.append(limit(name, strategy, cluster))
        console.print(table(f"{name} on {cluster.name}; times are predicted", found))
        rows += found
        if not args.quick:
            found = [limit(name, each, cluster, OFFLOAD) for each in STRATEGIES]
            title = f"{name}, layers' inputs in the hosts' memory"
            console.print(table(title, found))
            rows += [each | {"beside": "inputs offloaded"} for each in found]
    found = []
    scaling = (1,) if args.quick else (1, 2, 4, 8)
    for hosts in () if args.sparse else scaling:
        cluster = Cluster(target, hosts, 8, timeout_seconds=3600)
        config = run("gpt_1b", "ulysses", cluster, 8 * hosts, 128 * K * hosts, 1)
        found.append(row("gpt_1b", config, cluster))
    if found:
        console.print(table("gpt_1b, 128K tokens for each 8 GPUs", found))
    rows += found
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    if args.plot:
        plot([each for each in rows if "beside" not in each], args.plot)


if __name__ == "__main__":
    main()
