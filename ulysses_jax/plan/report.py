"""A plan for a person: a few tables in the terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

from ulysses_jax.config import Memory

GIB, GB = 2**30, 10**9

PARTS = {
    "parameters": "parameters_bytes",
    "gradients": "gradients_bytes",
    "optimizer": "optimizer_bytes",
    "activations and temporaries": "activations_bytes",
    "batch and the rest": "batch_bytes",
    "estimated (CUDA, NCCL, cuDNN)": "estimated_bytes",
}

TIMES = (
    "matmul",
    "attention",
    "recurrence",
    "elementwise",
    "optimizer",
    "exposed_communication",
    "exposed_host",
)


def print_plan(plan: dict[str, Any], console: Console) -> None:
    """Prints a plan; each table's title says where its figures come from."""
    mesh = " x ".join(f"{axis}={n}" for axis, n in plan["mesh"].items() if n > 1)
    chunks = plan["head_chunks"]
    groups = f", heads in {chunks} groups" if chunks > 1 else ""
    console.print(
        f"[bold]{plan['gpus']}[/bold]  {mesh or 'one device'}  {plan['strategy']}"
        f"{groups}  "
        f"{plan['batch_size']} x {plan['tokens']:,} tokens a step in "
        f"{_parts(plan['accumulation_steps'])}; compiled in "
        f"{plan['compile_seconds']:.0f} s"
    )
    if "lengths" in plan:
        _print_lengths(plan["lengths"], console)
    if plan["reckoning"]:
        _print_reckoning(plan["reckoning"], console)
    if "auto" in plan:
        _print_auto(plan, console)
    _print_attention(plan["attention"], console)
    _print_memory(plan["memory"], console)
    console.print(verdict(plan), style="bold green" if plan["fits"] else "bold red")
    _print_traffic(plan, console)
    _print_time(plan["predicted"], console)
    for array in plan["memory"]["large_buffers"]:
        console.print(
            f"note: {array['array']} has more than 2^31 elements: a kernel that counts "
            f"in 32 bits would be wrong there (from {array['from'] or 'no name'})",
            style="yellow",
        )
    for warning in plan["warnings"]:
        console.print(f"warning: {warning}", style="yellow")


def _print_lengths(rows: list[dict[str, Any]], console: Console) -> None:
    table = _table(
        "Lengths: the longest is what is compiled; FLOPs by formula",
        "tokens",
        "rows",
        "mesh",
        "strategy",
        "TFLOP a step",
        "of the longest's",
        "attention",
    )
    for row in rows:
        mesh = (f"{axis}={n}" for axis, n in row["mesh"].items() if n > 1)
        table.add_row(
            f"{row['tokens']:,}",
            f"{row['rows']:,}",
            " x ".join(mesh),
            row["strategy"],
            f"{row['model_flops'] / 1e12:,.2f}",
            f"{row['model_flops'] / rows[-1]['model_flops']:.2f}",
            f"{row['attention_fraction']:.1%}",
        )
    console.print(table)


def _print_attention(rows: list[dict[str, Any]], console: Console) -> None:
    for row in rows:
        console.print(
            f"attention of {row['layers']} layers of kind {row['kind']}: "
            f"{row['kernel']}, {row['pairs_fraction']:.2%} of all pairs of tokens"
        )
        if row["why"]:
            console.print(f"warning: slow there: {row['why']}", style="yellow")


def _parts(number: int) -> str:
    return f"{number} part{'' if number == 1 else 's'}"


def verdict(plan: dict[str, Any]) -> str:
    """Fits or not, by how much, and what to change first."""
    memory = plan["memory"]
    free = memory["free_bytes"] / GIB
    if plan["fits"]:
        return f"It fits, with {free:.1f} GiB a GPU to spare."
    missing = []
    if free < 0:
        missing.append(f"{-free:.1f} GiB a GPU")
    host = memory["host_bytes_per_node"] - memory["host_limit_bytes_per_node"]
    if host > 0:
        missing.append(f"{host / GIB:.1f} GiB of memory a host")
    advice = plan["advice"][:1].upper() + plan["advice"][1:]
    return f"It does not fit: {' and '.join(missing)} missing. {advice}."


def _print_reckoning(rows: list[dict[str, Any]], console: Console) -> None:
    table = _table(
        "Strategies by formula: a layer and row, forward and backward",
        "strategy",
        "mesh",
        "MB a GPU",
        "of it between hosts",
        "predicted ms, not hidden",
        "",
    )
    least = min(row["link_seconds"] for row in rows)
    for row in rows:
        mesh = (f"{axis}={row[axis]}" for axis in ("ring", "seq") if row[axis] > 1)
        words = ["taken"] * row["is_taken"]
        words += ["the least"] * (row["link_seconds"] == least)
        table.add_row(
            row["strategy"],
            " ".join(mesh),
            f"{row['bytes'] / 1e6:,.1f}",
            f"{row['between_hosts_bytes'] / 1e6:,.1f}",
            f"{row['link_seconds'] * 1e3:,.2f}",
            ", ".join(words),
        )
    console.print(table)
    if not any(row["is_taken"] and row["link_seconds"] == least for row in rows):
        console.print(
            "The least on the links alone: what hides under compute differs, and "
            "--compare compiles each."
        )


def _print_auto(plan: dict[str, Any], console: Console) -> None:
    table = _table(
        "memory: auto takes the first that fits, from the cheapest on",
        "",
        "GiB a GPU",
        "GiB of the host",
        "predicted seconds",
    )
    for trial in plan["auto"]:
        least = "" if trial["is_compiled"] else "> "
        seconds = trial.get("step_seconds")
        table.add_row(
            trial["rung"],
            f"{least}{trial['device_bytes'] / GIB:,.1f}",
            f"{least}{trial['host_bytes'] / GIB:,.1f}",
            "" if seconds is None else f"{seconds:,.1f}",
            "taken" if trial["fits"] else "does not fit",
        )
    console.print(table)
    options = {
        name: value
        for name, value in plan["memory_options"].items()
        if value != getattr(Memory(), name)
    }
    words = (
        f"--memory.{name.replace('_', '-')} "
        + (" ".join(value) if isinstance(value, tuple | list) else str(value))
        for name, value in options.items()
    )
    console.print("That is " + " ".join(words))


def _print_memory(memory: dict[str, Any], console: Console) -> None:
    table = _table("Memory a GPU, from XLA's buffer assignment", "", "GiB", "")
    for label, name in PARTS.items():
        if name == "estimated_bytes":
            table.add_section()
            xla = memory["device_bytes"] / GIB
            table.add_row("XLA's buffers together", f"{xla:.2f}", "")
            for each in memory["estimated"]:
                table.add_row(
                    f"{each['name']} (estimated)",
                    f"{each['bytes'] / GIB:.2f}",
                    each["why"],
                    style="dim",
                )
        else:
            table.add_row(label, f"{memory[name] / GIB:.2f}", "")
    table.add_section()
    total = memory["device_bytes"] + memory["estimated_bytes"]
    share = total / memory["limit_bytes"]
    table.add_row(
        "together",
        f"{total / GIB:.2f}",
        f"{share:.0%} of the {memory['limit_bytes'] / GIB:.1f} GiB that CUDA offers",
    )
    host = memory["host_bytes_per_device"]
    if host:
        node, limit = memory["host_bytes_per_node"], memory["host_limit_bytes_per_node"]
        table.add_row(
            "host memory a GPU",
            f"{host / GIB:.2f}",
            f"{node / GIB:.1f} of {limit / GIB:.0f} GiB a host",
        )
        for label in ("parameters", "optimizer", "temporaries"):
            if part := memory[f"host_{label}_bytes"]:
                table.add_row(f"  {label}", f"{part / GIB:.2f}", "", style="dim")
    console.print(table)


def _sent(row: dict[str, Any]) -> tuple[str, ...]:
    """How often, GB, of the formula, and the ratio."""
    found = f"{row['count']:,}", f"{row['bytes'] / GB:.3f}"
    if row["formula_bytes"] is None:
        return *found, "", ""
    return *found, f"{row['formula_bytes'] / GB:.3f}", f"{row['ratio']:.3f}"


def _print_traffic(plan: dict[str, Any], console: Console) -> None:
    table = _table(
        "Sent a GPU a step, from the scheduled program",
        "collective",
        "times",
        "GB",
        "formula GB",
        "ratio",
        "under compute",
        "link",
    )
    fractions = plan["overlap"]["fractions"]
    total = sum(row["bytes"] for row in plan["traffic"])
    for row in plan["traffic"]:
        if row["bytes"] < total / 10_000:
            continue
        name = f"{row['collective']} over {row['axis']}"
        under = fractions.get(name)
        hidden = "" if under is None else f"{under:.0%}"
        table.add_row(name, *_sent(row), hidden, row["link"])
        for part in row["parts"]:
            table.add_row(f"  {part['what']}", *_sent(part), "", "", style="dim")
    if not plan["traffic"]:
        table.add_row("nothing", "", "", "", "", "", "")
    console.print(table)
    if plan["overlap"]["exchange_fraction"] is not None:
        copied = plan["copies"]["bytes_per_layer"]
        forward = plan["copies"]["phases"].get("forward", 0)
        console.print(
            f"Layout-only copies around the exchanges: {copied / 1e6:,.0f} MB a layer, "
            f"{forward / 1e6:,.0f} of them forward."
        )


def _print_time(predicted: dict[str, Any], console: Console) -> None:
    seconds = predicted["step_seconds"]
    unit, scale = ("seconds", 1) if seconds >= 1 else ("milliseconds", 1000)
    table = _table("Time of a step: predicted, not measured", "", unit, "")
    for label in TIMES:
        value = predicted[f"{label}_seconds"]
        note = f"{value / seconds:.0%}"
        if label.startswith("exposed_"):
            whole = predicted[f"{label.removeprefix('exposed_')}_seconds"]
            note += f", of {whole * scale:.3f} in all"
        table.add_row(label.replace("_", " "), f"{value * scale:.3f}", note)
    table.add_section()
    table.add_row(
        "step",
        f"{seconds * scale:.3f}",
        f"{predicted['tokens_per_second']:,.0f} tokens/s, MFU {predicted['mfu']:.1%}, "
        f"{predicted['tflops_per_gpu']:.0f} TFLOP/s a GPU; "
        f"{predicted['recomputed_flops_fraction']:.0%} of the FLOPs recomputed",
    )
    console.print(table)


def print_comparison(rows: list[dict[str, Any]], console: Console) -> None:
    """Prints strategies side by side; see `compare.compare`."""
    plan = rows[0]["plan"]
    table = _table(
        f"Strategies at {plan['batch_size']} x {plan['tokens']:,} tokens a step "
        "(times are predicted)",
        "strategy",
        "mesh",
        "fits",
        "GiB a GPU",
        "GB sent",
        "of it exchanged",
        "step s",
        "MFU",
    )
    for row in rows:
        table.add_row(
            row["strategy"],
            " ".join(f"{axis}={n}" for axis, n in row["mesh"].items() if n > 1),
            "yes" if row["fits"] else "no",
            f"{row['total_bytes'] / GIB:.1f}",
            f"{row['sent_bytes'] / GB:.2f}",
            f"{row['exchange_bytes'] / GB:.2f}",
            f"{row['step_seconds']:.2f}",
            f"{row['mfu']:.1%}",
        )
    console.print(table)


def print_check(found: dict[str, Any], console: Console) -> None:
    """Prints planned beside measured; see `check.check`."""
    title = f"Planned and measured on {found['num_devices']} x {found['device']}"
    table = _table(title, "what", "planned", "measured", "measured / planned")
    for row in found["rows"]:
        planned, measured = row["planned"], row["measured"]
        if row["unit"] == "bytes":
            cells = [f"{planned / 1e6:,.1f} MB", f"{measured / 1e6:,.1f} MB"]
        else:
            known = planned is not None
            cells = [f"{planned:.3f} s" if known else "", f"{measured:.3f} s"]
        table.add_row(
            row["what"], *cells, f"{measured / planned:.3f}" if planned else ""
        )
    console.print(table)
    _print_traffic(found["plan"], console)


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column(first)
    for header in others:
        is_text = header in ("", "link", "mesh", "fits")
        table.add_column(header, justify="left" if is_text else "right")
    return table
