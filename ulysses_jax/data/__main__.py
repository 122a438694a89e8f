"""A run's data, before it runs: `python -m ulysses_jax.data`.

python -m ulysses_jax.data prepare --files books --tokenizer my_llama --to prepared
python -m ulysses_jax.data verify prepared
python -m ulysses_jax.data inspect --config configs/tiny.yaml --row 0
"""

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from ulysses_jax.config import Config, Data, Model, Run, Training
from ulysses_jax.config_file import load_from_command_line
from ulysses_jax.data.chats import ExampleEncoder
from ulysses_jax.data.open import counted, open_data
from ulysses_jax.data.prepare import SHARD_TOKENS, prepare
from ulysses_jax.data.prepared import faults, read_index
from ulysses_jax.data.row_text import draw, lines_of, segments_of

PROGRAM = "python -m ulysses_jax.data"
_SECONDS = 10.0
_MOST_LETTERS = 2000


def main(argv: Sequence[str]) -> None:
    """Raises SystemExit: with code 2 for an error in words, 130 for Ctrl-C."""
    options, rest = _parser().parse_known_args(argv)
    if rest and (options.does is not _inspect or options.config is None):
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    options.overrides = rest
    try:
        options.does(options)
    except (ValueError, OSError) as error:
        line = str(error)
        if options.does is not _inspect or options.config is None:
            line = _as_options(line)
        print(f"{PROGRAM}: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; the same line goes on", file=sys.stderr)
        sys.exit(130)


def _prepare(options: argparse.Namespace) -> None:
    is_bytes = options.tokenizer == "bytes" and not Path("bytes").is_dir()
    folder = None if is_bytes else Path(options.tokenizer)
    started = time.monotonic()
    with _shown() as show:
        index = prepare(
            options.files,
            options.to,
            folder,
            text_field=None if options.chats else options.text_field,
            encoder=ExampleEncoder(folder) if options.chats else None,
            with_counts=options.chats,
            date=options.date,
            num_workers=options.workers,
            shard_tokens=options.shard_tokens,
            on_progress=show,
            say=lambda line: print(_as_options(line), flush=True),
        )
    skipped = index["skipped"]
    print(
        f"{options.to}: {_sizes(index)} of {index['dtype']}, "
        f"{counted(len(index['shards']), 'shard')}"
        + (f"; skipped {counted(skipped, 'document')} without text" if skipped else "")
        + f"; {time.monotonic() - started:.0f} s"
    )


@contextlib.contextmanager
def _shown() -> Iterator[Callable[[float, int, int], None]]:
    """A bar on a terminal, a line now and then elsewhere."""
    said = time.monotonic()
    bar = Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    task = bar.add_task("reading", total=None)

    def show(share: float, documents: int, tokens: int) -> None:
        nonlocal said
        what = f"{documents:,} documents, {tokens:,} tokens"
        if bar.console.is_terminal:
            bar.update(task, description=what, completed=share, total=1.0)
        elif time.monotonic() - said >= _SECONDS:
            said = time.monotonic()
            print(f"{share:.1%}: {what}", flush=True)

    with bar if bar.console.is_terminal else contextlib.nullcontext():
        yield show


def _verify(options: argparse.Namespace) -> None:
    index = read_index(options.folder)
    wrong = [
        fault
        for shard in range(len(index["shards"]))
        for fault in faults(options.folder, index, shard)
    ]
    if wrong:
        raise ValueError("; ".join(wrong))
    print(
        f"{options.folder}: {counted(len(index['shards']), 'shard')}, as written: "
        f"{_sizes(index)}"
    )


def _inspect(options: argparse.Namespace) -> None:
    data = open_data(_config(options))
    part = "validation" if options.validation else "training"
    rows = data.validation if options.validation else data.train
    if rows is None:
        raise ValueError("--validation: data.validation_fraction is 0")
    if data.by_length is not None and rows is data.train:
        of_length = data.by_length.rows
        rows = of_length.get(options.sequence_tokens or max(of_length))
        if rows is None:
            raise ValueError(
                f"--sequence-tokens {options.sequence_tokens} is none of data.lengths: "
                f"give one of {', '.join(map(str, of_length))}"
            )
        part += f", of {rows.sequence_tokens:,} tokens each"
    for note in data.notes:
        print(note if options.config else _as_options(note))
    segments = segments_of(rows, options.row)
    console = Console(highlight=False)
    print(f"row {options.row:,} of {len(rows):,} of {part}; [what no label asks for]")
    for title, text in lines_of(segments, data.tokenizer):
        console.print(Text(title, style="bold"))
        if not options.whole and len(text) > _MOST_LETTERS:
            half = _MOST_LETTERS // 2
            cut = len(text) - 2 * half
            text = f"{text[:half]}\n... {cut:,} letters, --whole ...\n{text[-half:]}"
        console.print(Text(text), soft_wrap=True)
    if options.png is not None:
        title = f"row {options.row} of {part}, {rows.sequence_tokens:,} tokens"
        _write(options.png, draw(segments, title=title))


def _config(options: argparse.Namespace) -> Config:
    if options.config is not None:
        words = ["--config", options.config, *options.overrides]
        (config, *others) = load_from_command_line(words, program=PROGRAM)
        if others:
            raise ValueError(
                f"{options.config} has {1 + len(others)} stages: give a stage's own "
                "config.yaml, of its run's folder"
            )
        return config
    if options.files is None:
        raise ValueError("say what to read: --config FILE, or --files FOLDER")
    return Config(
        run=Run(seed=options.seed),
        model=Model(vocab_size=2**31 - 1, from_=options.tokenizer),
        data=Data(
            files=options.files,
            text_field=options.text_field,
            validation_fraction=options.validation_fraction,
            mask_documents=options.mask_documents,
        ),
        training=Training(
            sequence_tokens=options.sequence_tokens or 2048, batch_size=1
        ),
    )


def _sizes(index: dict[str, Any]) -> str:
    documents, tokens = index["documents"], index["tokens"]
    return f"{counted(documents, 'document')}, {counted(tokens, 'token')}"


def _as_options(line: str) -> str:
    """What a run's field is called here."""
    for name in ("files", "text_field", "validation_fraction"):
        line = line.replace(f"data.{name}", f"--{name.replace('_', '-')}")
    return line


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.absolute().parent, delete=False) as part:
        part.write(data)
    os.chmod(part.name, 0o644)
    os.replace(part.name, path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="A run's data, before it runs.", allow_abbrev=False
    )
    programs = parser.add_subparsers(required=True, metavar="prepare|verify|inspect")

    def program(name: str, does: Callable, help: str) -> Callable:
        own = programs.add_parser(name, help=help, allow_abbrev=False)
        own.set_defaults(does=does)
        return own.add_argument

    add = program("prepare", _prepare, "tokenise files once, into a folder for runs")
    _add_files(add, required=True)
    add(
        "--tokenizer",
        required=True,
        metavar="FOLDER|bytes",
        help="a folder with a tokenizer.json, such as the model's; or bytes",
    )
    add(
        "--chats",
        action="store_true",
        help="JSON lines of messages, or of prompt and completion: the loss asks for "
        "the answers",
    )
    add(
        "--date",
        metavar="YYYY-MM-DD",
        help="that a chat template is told; default: as the folder was begun, else "
        "today",
    )
    add("--to", required=True, type=Path, metavar="DIR", help="a new folder")
    add(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes that tokenise; default: one a core",
    )
    add(
        "--shard-tokens",
        type=int,
        default=SHARD_TOKENS,
        metavar="N",
        help=f"of a file of ids; default: {SHARD_TOKENS}",
    )

    add = program("verify", _verify, "is a prepared folder as it was written?")
    add("folder", type=Path, metavar="DIR")

    add = program("inspect", _inspect, "a row as text: documents, positions, labels")
    add("--config", metavar="FILE", help="of a run; its fields may follow, as there")
    _add_files(add, required=False)
    add("--tokenizer", metavar="FOLDER", help="with --files; default: bytes")
    add(
        "--sequence-tokens",
        type=int,
        metavar="T",
        help="of a row; default: 2048, and with data.lengths their longest",
    )
    add("--validation-fraction", type=float, default=0.05, metavar="X")
    add("--mask-documents", action=argparse.BooleanOptionalAction, default=True)
    add("--seed", type=int, default=0)
    add("--row", type=int, default=0, metavar="N")
    add("--validation", action="store_true", help="a row that validates")
    add("--whole", action="store_true", help="all of its text")
    add("--png", type=Path, metavar="FILE", help="draw it")
    return parser


def _add_files(add: Callable, *, required: bool) -> None:
    add(
        "--files",
        required=required,
        metavar="FILES",
        help="a folder, a glob, a file or stdlib, as data.files",
    )
    add(
        "--text-field",
        default="text",
        metavar="NAME",
        help="of JSON lines, or a table's column; default: text",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
