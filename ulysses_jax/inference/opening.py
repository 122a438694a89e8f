"""What programs with a model share: its folder, a mesh, and files out."""

import argparse
import contextlib
import dataclasses
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from ulysses_jax.complete import complete
from ulysses_jax.config import Config, Model, Training
from ulysses_jax.config_file import load
from ulysses_jax.data.corpus import find_documents
from ulysses_jax.data.prepared import is_prepared
from ulysses_jax.data.sources import records
from ulysses_jax.data.stream import Stream
from ulysses_jax.data.streams import whole_stream
from ulysses_jax.data.tokenizer import Tokenizer, check_vocabulary, tokenizer_of
from ulysses_jax.distributed import start_distributed
from ulysses_jax.families.config_json import source_model
from ulysses_jax.interop import from_pretrained
from ulysses_jax.mesh import AXES, make_mesh, simulate_cpu_devices
from ulysses_jax.placement import place
from ulysses_jax.run_folder import is_run_folder, stages_in
from ulysses_jax.strategies import strategy_of


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The model, the mesh and the processes."""
    add = parser.add_argument
    add("--model", required=True, type=Path, help="a Hugging Face folder, or a run's")
    add(
        "--compute-dtype",
        choices=("bfloat16", "float32"),
        help="of products; default: as the weights are, or as the run's",
    )
    add_mesh_options(parser)


def add_mesh_options(parser: argparse.ArgumentParser) -> None:
    """The mesh and the processes."""
    add = parser.add_argument
    for axis in AXES:
        help = "default, where no degree is given: all devices" * (axis == "seq")
        add(f"--mesh.{axis}", type=int, metavar="N", help=help or None)
    add("--simulated-cpu-devices", type=int, metavar="N")
    add("--distributed.coordinator", metavar="HOST:PORT", dest="coordinator")
    add("--distributed.num-processes", type=int, metavar="N", dest="num_processes")
    add("--distributed.process-id", type=int, metavar="I", dest="process_id")
    seconds = "--distributed.wait-seconds"
    add(seconds, type=float, default=300.0, metavar="S", dest="wait_seconds")


def add_result_options(parser: argparse.ArgumentParser) -> None:
    """Of what is measured: how, and where results go."""
    add = parser.add_argument
    add("--batch-size", type=int, default=1, metavar="B", help="rows at a time")
    add("--json", type=Path, metavar="FILE", help="write the result")
    add("--png", type=Path, metavar="FILE", help="draw it")
    add(
        "--text-field",
        default="text",
        metavar="NAME",
        help="of JSON lines, or a table's column, in --data; default: text",
    )


@contextlib.contextmanager
def mesh_of(options: argparse.Namespace) -> Iterator[Mesh]:
    """Starts the processes, checks what can be checked early, and sets the mesh.

    Args:
      options: of `add_mesh_options`, and of `add_result_options` or not.

    Raises:
      ValueError: a count that is none, a file that cannot be written, a mesh that is
        not there.
    """
    said = vars(options)
    for name in ("batch_size", "max_rows", "simulated_cpu_devices"):
        given = said.get(name)
        if given is not None and given < 1:
            raise ValueError(f"--{name.replace('_', '-')} {given}: give 1 or more")
    for path in filter(None, map(said.get, ("json", "png"))):
        _check_writable(path)
    start_distributed(
        options.coordinator,
        options.num_processes,
        options.process_id,
        options.wait_seconds,
    )
    simulate_cpu_devices(options.simulated_cpu_devices)
    asked = {axis: said[f"mesh.{axis}"] for axis in AXES}
    degrees = {axis: n for axis, n in asked.items() if n is not None}
    mesh = make_mesh(**(degrees or {"seq": -1}), axis_type=AxisType.Explicit)
    with jax.set_mesh(mesh):
        yield mesh


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that is not read yet."""

    folder: Path
    model: Model
    tokenizer: Tokenizer

    def read(self, options: argparse.Namespace) -> Any:
        return from_pretrained(self.folder, compute_dtype=options.compute_dtype)


def model_of_folder(folder: Path) -> Model:
    """As its config says; nothing else is read.

    Raises:
      ValueError: what is no model's folder.
    """
    if is_run_folder(folder):
        return load(folder / "config.yaml").model
    if stages := stages_in(folder):
        raise ValueError(
            f"{folder} has stages, each a run: give {', or '.join(map(str, stages))}"
        )
    return source_model(folder)


def source_of(folder: Path) -> Source:
    """Raises ValueError: what is no model's folder; a tokenizer of more ids."""
    model = model_of_folder(folder)
    tokenizer = tokenizer_of(folder)
    check_vocabulary(model.vocab_size, tokenizer)
    return Source(folder, model, tokenizer)


def batch_shape(
    model: Model, tokens: int, batch_size: int, mesh: Mesh
) -> tuple[int, int]:
    """Rows and tokens of a batch: rounded up to what the mesh divides.

    Raises:
      ValueError: a model that does not divide over the mesh; more tokens than it has
        positions for; a RoPE that would see the rounding.
    """
    if tokens < 2:
        raise ValueError(f"rows of {tokens} tokens predict nothing: use 2 or more")
    if model.max_positions and tokens > model.max_positions:
        raise ValueError(
            f"rows of {tokens} tokens are longer than the model's table of "
            f"{model.max_positions} learned positions: use {model.max_positions} or "
            "fewer"
        )
    degrees = dict(mesh.shape)
    over = degrees["data"] * degrees["fsdp"]
    rows = math.ceil(batch_size / over) * over
    here = dataclasses.replace(
        model,
        strategy=strategy_of(degrees["ring"], degrees["seq"]),
        attention="auto",
        zigzag=False,
    )
    training = Training(batch_size=rows, sequence_tokens=tokens)
    config = complete(Config(model=here, training=training), name="evaluate")
    padded = place(config, degrees).padded_tokens()
    if padded != tokens and model.rope.scaling in ("dynamic", "longrope"):
        raise ValueError(
            f"rows of {tokens} tokens become {padded} on mesh.ring {degrees['ring']} x "
            f"mesh.seq {degrees['seq']}, and RoPE of scaling {model.rope.scaling} goes "
            f"by a row's length: use rows of {padded}"
        )
    return rows, padded


def stream_of(
    options: argparse.Namespace, tokenizer: Tokenizer, *, ends: bool
) -> Stream:
    """The documents of `--data`; says what was left out.

    Args:
      ends: whether a document's ids, where these are no bytes, end with the
        tokenizer's own for it.

    Raises:
      ValueError: nothing there that can be read.
    """
    with _as_options():
        field = options.text_field
        stream, notes = whole_stream(options.data, tokenizer, field, ends=ends)
    for note in notes:
        say(note.replace("data.files", "--data"))
    return stream


def text_of_data(options: argparse.Namespace) -> str:
    """All documents of `--data` as one text; says what was left out.

    Raises:
      ValueError: nothing there that can be read; tokens that were prepared.
    """
    if is_prepared(Path(options.data)):
        raise ValueError(
            f"--data {options.data} holds tokens, not text: give the files that it was "
            "prepared from"
        )
    with _as_options():
        files, notes = find_documents(options.data)
        found = [each.data for each in records(files, options.text_field)]
    for note in notes:
        say(note.replace("data.files", "--data"))
    return "\n".join(data.decode(errors="replace") for data in found)


@contextlib.contextmanager
def _as_options() -> Iterator[None]:
    """A run's fields are said as the options here."""
    try:
        yield
    except ValueError as error:
        said = str(error).replace("data.files", "--data")
        raise ValueError(said.replace("data.text_field", "--text-field")) from None


def say(line: str) -> None:
    """On the first process."""
    if jax.process_index() == 0:
        print(line, flush=True)


def _check_writable(path: Path) -> None:
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ValueError(
            f"{path}: there is no folder {folder}: make it, or give another"
        )
    if path.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"{path} cannot be written as a file: give another")


def write_whole(path: Path | None, content: bytes) -> None:
    """On the first process, aside and then renamed: there is a whole file, or what was
    there before."""
    if path is None or jax.process_index():
        return
    with tempfile.NamedTemporaryFile(dir=path.absolute().parent, delete=False) as part:
        try:
            part.write(content)
            part.flush()
            os.chmod(part.name, 0o644)
            os.replace(part.name, path)
        except BaseException:
            os.unlink(part.name)
            raise
