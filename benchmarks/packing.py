"""What do whole documents cost in padding, and does each group have the same work?

    .venv/bin/python benchmarks/packing.py [--files FILES] [--json FILE] [--quick]

Of a corpus that a run reads, with bytes as tokens. Cuts: of documents, by ends of
rows. Pairs of padding: what attention would compute if a row's padding saw itself, by
those of documents; a run's does not. Balance: how many times as long attention's part
of a step takes as if all of 8 groups of devices had the same work, in the mean over
steps and in the worst of them: the sum over microbatches of the most that a group has,
by their mean.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ulysses_jax.data.balance import deal, imbalance, work
from ulysses_jax.data.corpus import find_documents
from ulysses_jax.data.packed_rows import PackedRows
from ulysses_jax.data.rows import Rows
from ulysses_jax.data.split import shuffled, split
from ulysses_jax.data.stream import ByteStream

TOKENS = (2048, 16_384, 131_072)
GROUPS = 8
STEPS = ((1, 1), (1, 2), (1, 4), (4, 1), (4, 2), (4, 4))  # microbatches, rows a group


def packing_row(rows: Rows, seconds: float) -> dict[str, Any]:
    lengths = [rows.lengths(i) for i in range(len(rows))]
    padding = rows.sequence_tokens - np.array([each.sum() for each in lengths])
    pairs = sum(work(each) for each in lengths)
    packing = rows.packing if isinstance(rows, PackedRows) else None
    whole = "stream" if packing is None else "whole"
    ends = np.arange(1, len(rows) + 1) * rows.sequence_tokens
    cut = len(np.setdiff1d(ends, rows.stream.ends)) - (rows.num_tokens < ends[-1])
    return {
        "tokens": rows.sequence_tokens,
        "packing": whole,
        "rows": len(rows),
        "padding": float(padding.sum() / (len(rows) * rows.sequence_tokens)),
        "of the last row": float(padding[-1] / rows.sequence_tokens),
        "pairs of padding": float((padding.astype(float) ** 2).sum() / pairs),
        "cuts": int(cut)
        if packing is None
        else len(packing.document) - len(rows.stream.ends),
        "seconds": seconds,
    }


def balance_row(
    rows: Rows, accumulation_steps: int, places: int, most_steps: int
) -> dict[str, Any]:
    works = np.array([work(rows.lengths(i)) for i in range(len(rows))])
    num = accumulation_steps * GROUPS * places
    random = np.random.default_rng(0)
    num_epochs = -(-most_steps * num // len(works))
    order = np.concatenate([random.permutation(works) for _ in range(num_epochs)])
    in_order = np.arange(num).reshape(accumulation_steps, -1)
    before, after, seconds = [], [], 0.0
    for step in order[: most_steps * num].reshape(-1, num):
        before.append(imbalance(step, in_order, GROUPS))
        started = time.perf_counter()
        dealt = deal(step, accumulation_steps, GROUPS)
        seconds += time.perf_counter() - started
        after.append(imbalance(step, dealt, GROUPS))
    return {
        "tokens": rows.sequence_tokens,
        "packing": "whole" if isinstance(rows, PackedRows) else "stream",
        "microbatches": accumulation_steps,
        "rows a group": places,
        "before": float(np.mean(before)),
        "before, worst": float(np.max(before)),
        "after": float(np.mean(after)),
        "after, worst": float(np.max(after)),
        "ms a step": 1e3 * seconds / len(before),
    }


def show(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(_cell(name, value) for name, value in row.items()))
    Console().print(table)


def _cell(name: str, value: Any) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else value
    if "padding" in name or name == "of the last row":
        return f"{value:.2%}"
    return f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", default="stdlib", help="as data.files of a run")
    parser.add_argument("--json", type=Path, help="where the rows go")
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    options = parser.parse_args()
    documents, _ = find_documents(options.files)
    stream = ByteStream(shuffled(split(documents, 0.05)[0], 0))
    packings, balances = [], []
    for tokens in TOKENS:
        for kind in (Rows, PackedRows):
            started = time.perf_counter()
            rows = kind(stream, tokens, mask_documents=True)
            packings.append(packing_row(rows, time.perf_counter() - started))
            if tokens > TOKENS[0]:
                balances += [
                    balance_row(rows, *step, 10 if options.quick else 100)
                    for step in STEPS
                ]
    lengths = np.diff(stream.ends, prepend=0)
    show(
        f"Padding: {len(lengths):,} documents, {int(lengths.sum()):,} tokens, "
        f"{lengths.mean():,.0f} in the mean, {lengths.max():,} at most",
        packings,
    )
    show(f"Attention's part of a step on {GROUPS} groups, 1: all alike", balances)
    if options.json:
        options.json.write_text(json.dumps({"packing": packings, "balance": balances}))


if __name__ == "__main__":
    main()
