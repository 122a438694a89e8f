"""Data prepared once: how fast, and what does a run's start take from it?

    .venv/bin/python benchmarks/prepare.py [--json FILE] [--quick]

The standard library's source as JSON lines, each file three times (--quick: once), and
a BPE of 8,192 ids learned from it. Each row is a process of its own, with what it takes
to start Python and JAX. `peak` is its largest resident memory. `of CPU` is with the
processes that it starts; other work on the machine does not change it much. `read` is
of ids, by one process of eight that hold an eighth of the tokens of every row of a
batch [1, 2, T], as a share of what one process reads. Files lie in the page cache.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

_MAKE = """
import json, sys, tokenizers
from pathlib import Path
from tokenizers import decoders, models, pre_tokenizers, trainers
from ulysses_jax.data.corpus import find_documents
folder, copies = Path(sys.argv[1]), int(sys.argv[2])
texts = [d.path.read_bytes().decode(errors="replace")
         for d in find_documents("stdlib").documents]
with open(folder / "text.jsonl", "w") as file:
    for text in copies * texts:
        file.write(json.dumps({"text": text}) + "\\n")
made = tokenizers.Tokenizer(models.BPE())
made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
made.decoder = decoders.ByteLevel()
made.train_from_iterator(texts[:300], trainers.BpeTrainer(
    vocab_size=8192, special_tokens=["</s>"], show_progress=False,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
(folder / "model").mkdir()
made.save(str(folder / "model" / "tokenizer.json"))
(folder / "model" / "generation_config.json").write_text('{"eos_token_id": 0}')
"""

_START = """
import json, resource, sys, time
from ulysses_jax.complete import complete
from ulysses_jax.config import Config, Data, Model, Training
from ulysses_jax.data.open import open_data
import numpy as np
from ulysses_jax.data.loader import read_box
files, folder, span = sys.argv[1], sys.argv[2], int(sys.argv[3])
started = time.perf_counter()
config = Config(model=Model(vocab_size=8192, from_=folder), data=Data(files=files),
                training=Training(sequence_tokens=span))
data = open_data(complete(config, name="x"))
opened = time.perf_counter() - started
tokens = data.train.stream._tokens
found = dict(seconds=opened, tokens=data.train.num_tokens + data.validation.num_tokens,
             peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
if hasattr(tokens, "num_read_bytes"):
    def read(part, of):
        tokens.num_read_bytes = 0
        at = [(part + i) * span // of for i in (0, 1)]
        read_box(data.train, np.array([[0, 1]]), ((0, 1), (0, 2), tuple(at)))
        return tokens.num_read_bytes
    whole = read(0, 1)
    found["read_shares"] = [read(part, 8) / whole for part in range(8)]
print(json.dumps(found))
"""


def rows(copies: int, span: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        run("-c", _MAKE, place, copies)
        file, model = folder / "text.jsonl", folder / "model"
        found = []
        for tokenizer, workers in (("bytes", 1), (model, 1), (model, 2)):
            to = folder / f"{Path(tokenizer).name}-{workers}"
            started, cpu_before = time.perf_counter(), cpu_seconds()
            line = f"prepare --files {file} --tokenizer {tokenizer} --to {to}"
            run("-m", "ulysses_jax.data", *line.split(), "--workers", workers)
            seconds = time.perf_counter() - started
            index = json.loads((to / "index.json").read_bytes())
            what = f"prepare, {workers} process{'es' * (workers > 1)}"
            found.append(
                {
                    "what": f"{what}, {'bytes' if tokenizer == 'bytes' else 'BPE'}",
                    "seconds": seconds,
                    "cpu_seconds": cpu_seconds() - cpu_before,
                    "tokens": index["tokens"],
                    "file_bytes": file.stat().st_size,
                }
            )
        for what, files in (("JSON lines", file), ("prepared", folder / "model-2")):
            cpu_before = cpu_seconds()
            row = json.loads(run("-c", _START, files, model, span))
            row["cpu_seconds"] = cpu_seconds() - cpu_before
            found.append({"what": f"start of a run: {what}, BPE", **row})
        return found


def cpu_seconds() -> float:
    """Of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(*words: Any) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


def print_table(found: list[dict[str, Any]]) -> None:
    table = Table(title="Tokens prepared, and read")
    for name in (
        "what",
        "seconds",
        "of CPU",
        "M tokens",
        "M tokens/s",
        "peak GiB",
        "read",
    ):
        table.add_column(name, justify="left" if name == "what" else "right")
    for row in found:
        shares = row.get("read_shares")
        table.add_row(
            row["what"],
            f"{row['seconds']:.2f}",
            f"{row['cpu_seconds']:.1f}",
            f"{row['tokens'] / 1e6:.1f}",
            f"{row['tokens'] / 1e6 / row['seconds']:.2f}",
            f"{row['peak_bytes'] / 2**30:.2f}" if "peak_bytes" in row else "",
            f"{min(shares):.4f} to {max(shares):.4f}" if shares else "",
        )
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows")
    parser.add_argument("--quick", action="store_true", help="a third of the text")
    options = parser.parse_args()
    found = rows(*((1, 2**17) if options.quick else (3, 2**20)))
    print_table(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
