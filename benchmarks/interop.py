"""A Hugging Face folder read and written: how long, and in how much memory?

    .venv/bin/python benchmarks/interop.py [--json FILE] [--quick]

A random Llama of 1 GB (--quick: 0.1 GB), in float32 and in bfloat16, on one CPU device.
Each row is a process of its own: `safetensors` alone reads every tensor into NumPy, or
writes them; `from_pretrained` makes the model, `save_pretrained` writes it again.
`peak` is the process's largest resident memory, JAX and Python (`start`) included.
Parameters are float32, so those of a bfloat16 file take twice its size. Files lie in
the page cache.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

GIB = 2**30
WIDTH, VOCABULARY = 2048, 32_000

_CHILD = """
import json, resource, sys, time
from pathlib import Path
what, folder = sys.argv[1], Path(sys.argv[2])
import jax
from safetensors import safe_open
from safetensors.numpy import save_file
from ulysses_jax.interop import from_pretrained, save_pretrained
import ml_dtypes
jax.devices()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
start, started = peak(), time.perf_counter()
def tensors():
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)
if what == "safetensors":
    held = dict(tensors())
    read = time.perf_counter() - started
    save_file(held, folder.with_name("again.safetensors"))
else:
    model = jax.block_until_ready(from_pretrained(folder))
    read = time.perf_counter() - started
    save_pretrained(model, folder.with_name("again"))
wrote = time.perf_counter() - started - read
print(json.dumps(dict(read_seconds=read, write_seconds=wrote, start_bytes=start,
                      peak_bytes=peak())))
"""

_MAKE = """
import sys, json, numpy as np, ml_dtypes
from pathlib import Path
from ulysses_jax.config import Model
from ulysses_jax.complete import complete_model
from ulysses_jax.families.config_json import config_of, family_of
from ulysses_jax.tensors.files import Shape, write
from ulysses_jax.tensors.expected import expected
folder, layers, dtype = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
model = complete_model(Model(vocab_size=%d, width=%d, num_layers=layers, num_heads=16))
values = config_of(model, None, 8192)
folder.mkdir()
(folder / "config.json").write_text(json.dumps(values | {"torch_dtype": dtype}))
draw = np.random.default_rng(0)
shapes = [Shape(each.name, each.shape) for each in expected(family_of(values), model)]
draws = (draw.standard_normal(each.shape, np.float32).astype(dtype) for each in shapes)
write(folder, shapes, draws, dtype=dtype, file_bytes=2**28)
"""


def child(program: str, *words: str) -> str:
    command = [sys.executable, "-c", program, *words]
    return subprocess.run(command, check=True, text=True, capture_output=True).stdout


def rows(gigabytes: float) -> list[dict[str, Any]]:
    """Of a folder of about so many bytes, in both dtypes."""
    found = []
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        outer = 2 * VOCABULARY * WIDTH * size
        # 4 D^2 of attention and 3 D F, F = 4 D, of feed-forward.
        layer = (4 + 12) * WIDTH**2 * size
        layers = max(round((gigabytes * 1e9 - outer) / layer), 1)
        for what in ("safetensors", "interop"):
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place) / "model"
                child(_MAKE % (VOCABULARY, WIDTH), str(folder), str(layers), dtype)
                files = folder.glob("*.safetensors")
                row = json.loads(child(_CHILD, what, str(folder)))
                found.append(
                    {
                        "what": what,
                        "dtype": dtype,
                        "file_bytes": sum(file.stat().st_size for file in files),
                        **row,
                    }
                )
    return found


def print_table(found: list[dict[str, Any]]) -> None:
    table = Table(title="A folder read and written again, on one CPU device")
    for name in ("by", "dtype", "GB", "read", "written", "GiB at start", "GiB at peak"):
        table.add_column(name, justify="right")
    for row in found:
        table.add_row(
            row["what"],
            row["dtype"],
            f"{row['file_bytes'] / 1e9:.2f}",
            f"{row['read_seconds']:.1f} s",
            f"{row['write_seconds']:.1f} s",
            f"{row['start_bytes'] / GIB:.2f}",
            f"{row['peak_bytes'] / GIB:.2f}",
        )
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows")
    parser.add_argument("--quick", action="store_true", help="0.1 GB")
    options = parser.parse_args()
    found = rows(0.1 if options.quick else 1.0)
    print_table(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
