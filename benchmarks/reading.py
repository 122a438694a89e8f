"""What does reading add to a step of 131,072 tokens, of each kind of source?

    .venv/bin/python benchmarks/reading.py [--json FILE] [--quick]

The standard library's source, as text, as JSON lines, and prepared as bytes; rows as a
stream, and of whole documents. `read` is seconds of the processor for a batch of one
row: its arrays, and their way to the device. `step` is a training step of a small model
on this machine's CPU, in seconds of the processor too, so that other work changes
neither; a larger model takes longer, and reads the same. `waited` is what of the
clock's seconds of a step went by before its batch was there. The first step, which
compiles, is left out; --quick: one step after it instead of three.
"""

import argparse
import contextlib
import itertools
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from jax.sharding import NamedSharding
from rich.console import Console
from rich.table import Table

from ulysses_jax.complete import complete
from ulysses_jax.config import Config, Data, Model, Run, Training
from ulysses_jax.data.corpus import find_documents
from ulysses_jax.data.loader import batches
from ulysses_jax.data.open import open_data
from ulysses_jax.data.prepare import prepare
from ulysses_jax.mesh import make_mesh, platform_of
from ulysses_jax.models.transformer import Transformer
from ulysses_jax.training.run import on_mesh
from ulysses_jax.training.state import first_state
from ulysses_jax.training.step import batch_shape, batch_spec, jit_train_step

_TOKENS, _BATCHES = 2**17, 16


def config_of(files: Path | str, fields: dict) -> Config:
    return complete(
        Config(
            run=Run(folder="none"),
            model=Model(vocab_size=320, width=64, num_layers=1, num_heads=1),
            data=Data(files=str(files), **fields),
            training=Training(sequence_tokens=_TOKENS, batch_size=1),
        ),
        name="reading",
    )


def read_seconds(config: Config) -> float:
    """Of the processor, a batch."""
    mesh = make_mesh(data=1, devices=jax.devices()[:1])
    sharding = NamedSharding(mesh, batch_spec(mesh))
    stream = batches(open_data(config).train, (1, 1, _TOKENS), sharding, seed=0)
    with contextlib.closing(stream):
        next(stream)
        started = time.process_time()
        for batch in itertools.islice(stream, _BATCHES):
            jax.block_until_ready(batch)
        return (time.process_time() - started) / _BATCHES


def step_of(config: Config, num_steps: int) -> dict[str, float]:
    """Seconds of a step and its batch: of the processor, of the clock, of waits."""
    config, mesh, _ = on_mesh(config, Transformer)
    sharding = NamedSharding(mesh, batch_spec(mesh))
    rows = open_data(config).train
    stream = batches(rows, batch_shape(config), sharding, seed=0)
    waited = 0.0
    with jax.set_mesh(mesh), contextlib.closing(stream):
        state = first_state(config, Transformer, None)
        step = jit_train_step(config, platform_of(mesh), Transformer)
        state, _ = jax.block_until_ready(step(state, next(stream)))
        begun, cpu_begun = time.monotonic(), time.process_time()
        for _ in range(num_steps):
            asked = time.monotonic()
            batch = next(stream)
            waited += time.monotonic() - asked
            state, _ = jax.block_until_ready(step(state, batch))
    clock, cpu = time.monotonic() - begun, time.process_time() - cpu_begun
    return {
        "step_cpu_seconds": cpu / num_steps,
        "step_seconds": clock / num_steps,
        "waited_seconds": waited / num_steps,
    }


def rows(num_steps: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as place:
        lines, prepared = Path(place, "text.jsonl"), Path(place, "prepared")
        with open(lines, "w") as file:
            for each in find_documents("stdlib").documents:
                text = each.path.read_bytes().decode(errors="replace")
                file.write(json.dumps({"text": text}) + "\n")
        prepare(str(lines), prepared)
        sources = {
            "text": config_of("stdlib", {}),
            "JSON lines": config_of(lines, {}),
            "prepared": config_of(prepared, {}),
            "prepared, whole documents": config_of(prepared, {"packing": "whole"}),
        }
        step = step_of(sources["prepared"], num_steps)
        found = []
        for name, config in sources.items():
            read = read_seconds(config)
            share = read / step["step_cpu_seconds"]
            found.append(
                {"source": name, "read_cpu_seconds": read, "read_share": share, **step}
            )
        return found


def print_table(found: list[dict[str, Any]]) -> None:
    step = found[0]
    waited = step["waited_seconds"] / step["step_seconds"]
    table = Table(
        title=f"Reading: a step of {_TOKENS:,} tokens "
        f"takes {step['step_cpu_seconds']:.1f} s of the processor, "
        f"{step['step_seconds']:.1f} of the clock, of which it waits for its batch "
        f"{waited:.4%}"
    )
    for name in ("source", "read, ms of the processor", "of a step's"):
        table.add_column(name, justify="left" if name == "source" else "right")
    for row in found:
        read, share = row["read_cpu_seconds"], row["read_share"]
        table.add_row(row["source"], f"{1e3 * read:.1f}", f"{share:.3%}")
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows")
    parser.add_argument("--quick", action="store_true", help="one step")
    options = parser.parse_args()
    found = rows(1 if options.quick else 3)
    print_table(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
