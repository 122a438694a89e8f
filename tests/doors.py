"""Where documents from outside come in: a valid one of each kind, and who reads it."""

import gzip
import io
import json
import shutil
import socket
import zlib
from collections.abc import Callable, Sequence
from contextlib import closing, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from junk import VALUES, YAML
from pyarrow import ipc, parquet
from safetensors.numpy import load_file, save
from word_tokenizer import write_tokenizer

from ulysses_jax import roll_call
from ulysses_jax.complete import complete
from ulysses_jax.config import Config, Lora, Model, Run
from ulysses_jax.config_file import load_from_command_line, load_stages
from ulysses_jax.data.chats import ExampleEncoder
from ulysses_jax.data.corpus import find_documents
from ulysses_jax.data.index_fields import check_begun
from ulysses_jax.data.open import refuse_other_data
from ulysses_jax.data.prepare import prepare
from ulysses_jax.data.prepared import PreparedTokens, is_prepared
from ulysses_jax.data.sources import records
from ulysses_jax.data.tokenizer import tokenizer_of
from ulysses_jax.families.config_json import (
    config_of,
    longest_of,
    read_config,
    source_model,
)
from ulysses_jax.inference.text import file_text, ids_of
from ulysses_jax.outside import read_object
from ulysses_jax.runs.page import page
from ulysses_jax.runs.read import read_runs
from ulysses_jax.tensors.expected import open_source
from ulysses_jax.training.checkpoint import Checkpointer
from ulysses_jax.training.load import open_run
from ulysses_jax.training.meta import saved_meta
from ulysses_jax.training.metrics import read_rows
from ulysses_jax.training.preflight import check_folder, refuse_other_model
from ulysses_jax.training.proof import COMMIT_FILE, why_broken, why_unfit, write_commit

TESTS = Path(__file__).parent
MODELS, CHATS = TESTS / "interop" / "fixtures", TESTS / "data" / "chat_fixtures"
FAMILIES = ("llama", "llama_biases", "yarn_llama", "qwen2", "gemma3", "gpt2", "phi3")


class Door(NamedTuple):
    """A reader of documents.

    Attributes:
      read: takes the bytes of one, and asserts that what it makes of them is whole.
      names: one of which is in the words of a refusal.
      documents: valid ones, for `junk.structured`.
      whole: valid ones, for `junk.mutated`.
      values: in the place of a document's.
      share: of the documents that others get, one in so many: it is slow.
    """

    read: Callable[[bytes], Any]
    names: Sequence[str]
    documents: Sequence[Any] = ()
    whole: Sequence[bytes] = ()
    values: Sequence[str] = VALUES
    share: int = 1


class _Broken(OSError):
    """Stands for words that are printed, and raise nothing."""


def config(folder: Path) -> Door:
    path = folder / "run.yaml"
    (folder / "a.txt").write_text("a text")

    def read(data: bytes) -> None:
        path.write_bytes(data)
        for found in load_stages(path):
            assert complete(found, name="run") == found
            path.write_text(found.to_yaml())
            assert load_stages(path) == (found,)
            assert found.run.folder
            check_folder(Path(found.run.folder))
            if found.data.files != "stdlib":
                find_documents(found.data.files, found.run.folder)

    document = {
        "run": {"folder": str(folder / "run"), "seed": 1, "after": None},
        "model": {
            "width": 64,
            "num_layers": 4,
            "num_heads": 4,
            "num_kv_heads": 2,
            "pattern": ["window", "full"],
            "window": 9,
            "norm_epsilon": 1e-6,
            "rope": {"base": 1e4, "scaling": "linear", "factor": 2.0},
            "lora": {"rank": 2, "targets": ["q"]},
            "from": None,
        },
        "data": {"files": str(folder / "a.txt"), "text_field": "text"},
        "training": {"num_steps": 5, "learning_rate": 3e-4, "sequence_tokens": 64},
        "mesh": {"seq": 2},
        "memory": {"remat": "full", "offload": ["inputs"]},
        "quiet": True,
    }
    stages = {"mesh": {"seq": 2}, "stages": [{"training": {"num_steps": 5}}, {}]}
    lengths = {
        "data": {"lengths": [16, 32], "curriculum": "uniform", "cycle_steps": 2},
        "training": {"sequence_tokens": 32},
        "memory": "auto",
    }
    mixture = {"data": {"mixture": ["a", "b"], "weights": [1, 2]}}
    documents = [document, stages, lengths, mixture]
    anchors = (
        b"training: &t {num_steps: &n 5, warmup_steps: *n}\nmodel: {<<: {width: 64}}\n"
    )
    whole = [(TESTS.parent / "configs" / "tiny.yaml").read_bytes(), anchors]
    whole.append(Config().to_yaml().encode())
    return Door(read, ["run.yaml", "."], documents, whole, (*VALUES, *YAML))


def command_line(folder: Path) -> Door:
    """Its words, a line each."""
    path = folder / "run.yaml"
    path.write_text("model: {width: 64}\n")
    given = [
        *(
            "--mesh.seq",
            "2",
            "--model.num-layers",
            "3",
            "--training.learning-rate=1e-4",
        ),
        *("--model.pattern", "full", "window", "--model.window", "9", "--quiet"),
        *(
            "--model.lora.rank",
            "2",
            "--memory.auto",
            "--data.files",
            "a",
            "--run.after",
        ),
        *("null", "--memory.offload", "inputs", "keys", "--training.zero-stage", "2"),
    ]

    def read(data: bytes) -> None:
        words = data.decode(errors="surrogateescape").split("\n")
        out = io.StringIO()
        try:
            with redirect_stdout(out), redirect_stderr(out):
                load_from_command_line(["--config", str(path), *words], program="run")
        except SystemExit as end:
            if end.code:
                raise _Broken(out.getvalue()) from None

    return Door(read, ["--", "."], whole=["\n".join(given).encode()], share=8)


def index(folder: Path) -> Door:
    """Of a prepared folder."""
    (folder / "in.jsonl").write_text('{"text": "a b"}\n{"text": "c"}\n' * 9)
    said = prepare(
        str(folder / "in.jsonl"),
        folder / "out",
        shard_tokens=20,
        with_counts=False,
    )
    path = folder / "out" / "index.json"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        is_prepared(path.parent)
        tokens = PreparedTokens(path.parent)
        num = sum(shard["tokens"] for shard in said["shards"])
        assert tokens.ends[-1] == num and len(tokens.ids(0, num)) == num
        tokens.counts(0, num)

    return Door(read, [path.name, "ends-0", "ids-0"], [said], [path.read_bytes()])


def ends(folder: Path) -> Door:
    """Where documents end, of a prepared folder."""
    door = index(folder)
    (folder / "out" / "index.json").write_bytes(door.whole[0])
    path = folder / "out" / "ends-00000.bin"
    whole = path.read_bytes()

    def read(data: bytes) -> None:
        path.write_bytes(data)
        PreparedTokens(path.parent)
        assert data == whole

    return Door(read, [path.name], whole=[whole])


def unfinished(folder: Path) -> Door:
    (folder / "in.txt").write_text("a b")
    said = prepare(str(folder / "in.txt"), folder / "out")
    path = folder / "unfinished.json"
    names = ("dtype", "num_ids", "tokenizer", "ends", "counts", "text_field")
    job = {name: said[name] for name in (*names, "shard_tokens", "files")}
    shards = [shard | {"next": [0, 1]} for shard in said["shards"]]

    def read(data: bytes) -> None:
        path.write_bytes(data)
        check_begun(path, read_object(path))

    document = {"job": job | {"date": "2026-01-31"}, "shards": shards}
    return Door(read, [path.name], [document], [json.dumps(document).encode()])


def dataset(folder: Path) -> Door:
    """What `datasets` says of a folder that it saved."""
    table = pyarrow.table({"text": ["a", "b"]})
    names = ["data-0.arrow", "data-1.arrow", "other.arrow"]
    for name in names:
        with ipc.new_stream(folder / name, table.schema) as writer:
            writer.write_table(table)
    (folder / "dataset_info.json").write_text("{}")
    outside = folder.parent / f"{folder.name}.arrow"
    shutil.copy(folder / names[0], outside)
    path = folder / "state.json"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        for each in find_documents(str(folder)).documents:
            assert each.path.resolve().parent == folder.resolve()

    document = {
        "_data_files": [{"filename": name} for name in names[:2]],
        "_split": "train",
    }
    return Door(read, [path.name], [document], [json.dumps(document).encode()])


def splits(folder: Path) -> Door:
    path = folder / "dataset_dict.json"
    document = {"splits": ["train", "test"]}

    def read(data: bytes) -> None:
        path.write_bytes(data)
        find_documents(str(folder))

    return Door(read, [path.name, folder.name], [document])


def _file(path: Path) -> Callable[[bytes], None]:
    """Reads a file's documents, whole."""

    def read(data: bytes) -> None:
        path.write_bytes(data)
        for record in records(find_documents(str(path)).documents, "text"):
            record.data.decode()

    return read


def lines(folder: Path) -> Door:
    path = folder / "a.jsonl"
    document = {"text": "a text", "id": 1}
    whole = json.dumps(document).encode() + b"\n"
    return Door(_file(path), [path.name], [document], [whole * 3])


def zipped(folder: Path) -> Door:
    path = folder / "a.jsonl.gz"
    whole = gzip.compress(b'{"text": "a text"}\n' * 9, mtime=0)
    zeros = gzip.compress(b"\0" * 2**22, mtime=0)
    return Door(_file(path), [path.name], whole=[whole, zeros])


def table(folder: Path) -> Door:
    path = folder / "a.parquet"
    made = pyarrow.table({"id": [1, 2, 3], "text": ["a text", "", "long" * 9]})
    whole = []
    for options in (
        dict(compression="none", use_dictionary=False, write_page_checksum=True),
        dict(compression="zstd"),
    ):
        parquet.write_table(made, path, row_group_size=2, **options)
        whole.append(path.read_bytes())
    return Door(_file(path), [path.name], whole=whole)


def arrow(folder: Path) -> Door:
    path = folder / "a.arrow"
    made = pyarrow.table({"id": [1, 2, 3], "text": ["a text", "", "long" * 9]})
    whole = []
    for new in (ipc.new_file, ipc.new_stream):
        with new(path, made.schema) as writer:
            writer.write_table(made, max_chunksize=2)
        whole.append(path.read_bytes())
    return Door(_file(path), [path.name], whole=whole)


_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m['content'] * 2 }}"
    "{% endgeneration %}{% endif %}{% endfor %}{{ 3 ** 2 }}"
)
_CHAT = [
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Ho."},
]


def chat(folder: Path) -> Door:
    """Lines that are to be prepared, with a template."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHATS / name, folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    marked = "{% for m in messages %}<|{{ m.role }}|>{% generation %}{{ m.content }}"
    marked += "{% endgeneration %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(marked)
    encoder = ExampleEncoder(folder)

    def read(data: bytes) -> None:
        found = encoder(data)
        assert len(found.ids) == len(found.counts)
        assert all(0 <= i < encoder.tokenizer.num_ids for i in found.ids.tolist())

    documents = [
        {"messages": _CHAT, "tools": [{"name": "f"}]},
        {"prompt": "a", "completion": "b"},
        {"text": "a"},
    ]
    # No file is known here: `prepare` names it, and the line.
    words = ["line", "message", "must", "template", "it has", "this is no", "nothing"]
    whole = [json.dumps(document).encode() for document in documents]
    return Door(read, words, documents, whole)


def template(folder: Path) -> Door:
    shutil.copy(CHATS / "tokenizer.json", folder)
    path = folder / "chat_template.jinja"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        ExampleEncoder(folder).encode({"messages": _CHAT})

    return Door(read, [path.name, "nothing in it"], whole=[_TEMPLATE.encode()])


def tokenizer_config(folder: Path) -> Door:
    shutil.copy(CHATS / "tokenizer.json", folder)
    path = folder / "tokenizer_config.json"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        tokenizer_of(folder).copy_to(folder / "copy")
        ExampleEncoder(folder).encode({"messages": _CHAT})

    (folder / "copy").mkdir()
    one = {"chat_template": _TEMPLATE, "bos_token": "<s>", "eos_token": "</s>"}
    named = [{"name": "default", "template": _TEMPLATE}, {"name": "x", "template": ""}]
    two = {"chat_template": named, "eos_token": {"content": "</s>"}}
    names = [path.name, folder.name, "nothing in it"]
    return Door(read, names, [one, two], [json.dumps(one).encode()])


def generation_config(folder: Path) -> Door:
    write_tokenizer(folder)
    path = folder / "generation_config.json"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = tokenizer_of(folder)
        assert all(0 <= end < found.num_ids for end in found.ends)
        found.copy_to(folder / "copy")

    (folder / "copy").mkdir()
    documents = [{"eos_token_id": 1, "x": 2}, {"eos_token_id": [1, 2]}]
    names = [path.name, folder.name]
    return Door(read, names, documents, [json.dumps(documents[1]).encode()])


def tokenizer(folder: Path) -> Door:
    path = folder / "tokenizer.json"
    write_tokenizer(folder)
    words = json.loads(path.read_bytes())
    chats = json.loads((CHATS / "tokenizer.json").read_bytes())
    merges = chats["model"]["merges"][:20]
    pairs = {x for pair in merges for x in (*pair, "".join(pair))}
    letters = "abcdehilnortx <>/s|"
    chats["model"]["merges"] = merges
    chats["model"]["vocab"] = {
        each: i for i, each in enumerate(sorted({*letters, *pairs}))
    }
    more = chats | {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "_"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "_"},
                {"type": "Replace", "pattern": {"Regex": "a+"}, "content": "b"},
            ],
        },
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "\\s+|\\w+"},
            "behavior": "Isolated",
            "invert": False,
        },
    }
    unigram = words | {
        "model": {
            "type": "Unigram",
            "unk_id": 0,
            "vocab": [["?", 0.0], ["a", -1.0], ["long", -2.0]],
            "byte_fallback": False,
        }
    }
    text = "a long text, " * 20 + "é\u65e5\U0001f600"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = tokenizer_of(folder)
        ids = found.encode(text)
        assert all(0 <= i < found.num_ids for i in ids)
        more, spans = found.encode_with_places(text, around=False)
        assert len(more) == len(spans)
        found.decode(ids)

    documents = [words, chats, more, unigram]
    whole = [json.dumps(document).encode() for document in documents]
    patterns = [
        '"(a+)+$"',
        '"(?:a|aa)+b"',
        '"["',
        '"(?<=a*)b"',
        '"' + "(" * 400 + '"',
        '{"Regex": "(x+x+)+y"}',
        '{"Regex": ""}',
        '{"String": ""}',
    ]
    return Door(read, [path.name], documents, whole, (*VALUES, *patterns))


def _read_model(folder: Path) -> None:
    tensors, wanted = open_source(source_model(folder))
    tensors.dtype()
    for each in wanted:
        found = tensors.read(each.name, (slice(0, 1),))
        assert found.shape == (min(1, each.shape[0]), *each.shape[1:])


def header(folder: Path) -> Door:
    """Of safetensors."""
    shutil.copy(MODELS / "gemma3" / "config.json", folder)
    tensors = {}
    for file in sorted((MODELS / "gemma3").glob("*.safetensors")):
        tensors |= load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    data = save(tensors)
    length = int.from_bytes(data[:8], "little")
    document, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    path = folder / "model.safetensors"

    def read(data: bytes) -> None:
        with_length = len(data).to_bytes(8, "little") + data
        path.write_bytes(with_length + body)
        _read_model(folder)

    return Door(
        read, [path.name, folder.name], [document], [json.dumps(document).encode()]
    )


def safetensors(folder: Path) -> Door:
    """Files of them, whole."""
    door = header(folder)
    path = folder / "model.safetensors"
    door.read(door.whole[0])

    def read(data: bytes) -> None:
        path.write_bytes(data)
        _read_model(folder)

    return door._replace(read=read, whole=[path.read_bytes()], documents=())


def model_index(folder: Path) -> Door:
    own = Path(shutil.copytree(MODELS / "llama", folder / "model"))
    shutil.copy(next(own.glob("*.safetensors")), folder / "x")
    path = own / "model.safetensors.index.json"
    whole = path.read_bytes()

    def read(data: bytes) -> None:
        path.write_bytes(data)
        tensors, _ = open_source(source_model(own))
        assert {each.file.parent for each in tensors.entries.values()} == {own}

    return Door(read, [path.name, str(own)], [json.loads(whole)], [whole])


def model_config(folder: Path) -> Door:
    documents = [
        json.loads((MODELS / each / "config.json").read_bytes()) for each in FAMILIES
    ]
    whole = [json.dumps(document).encode() for document in documents]
    path = folder / "config.json"
    holder: dict[str, Path] = {}
    for each, document in zip(FAMILIES, documents, strict=True):
        holder.setdefault(document["model_type"], MODELS / each)

    def read(data: bytes) -> None:
        path.write_bytes(data)
        longest_of(folder)
        found = source_model(folder)
        said = read_config(folder)
        own = holder[said["model_type"]]
        for file in own.glob("*.safetensors*"):
            if not (folder / file.name).exists():
                (folder / file.name).symlink_to(file)
        config_of(found, said, None)
        config_of(found, said, 2**20)

    return Door(read, [path.name], documents, whole)


def _checkpoint(folder: Path) -> tuple[Path, dict[str, Any]]:
    """A folder as that of a step; what its commit file says."""
    own = folder / "run" / "checkpoints" / "7"
    (own / "d").mkdir(parents=True)
    (own / "_METADATA").write_text("{}")
    (own / "d" / "0").write_bytes(b"arrays")
    (folder / "run" / "checkpoints" / "outside").write_bytes(b"arrays")
    body = {
        "step": 7,
        "meta": {
            "model": {"width": 8, "rope": {"base": 1.0}, "class": "Transformer"}
            | {"lora": {"rank": 2, "alpha": 2.0, "targets": ["q"]}},
            "data": {"fingerprint": "00"},
            "optimizer": "adamw",
            "schedule": {"learning_rate": 1e-3, "num_steps": 9},
            "base": {"model.safetensors": "9 bytes, 00"},
        },
        "arrays": {".step": ["int32", []], ".parameters['x']": ["float32", [2]]},
    }
    write_commit(own, body)
    return own, json.loads((own / COMMIT_FILE).read_text().splitlines()[0])


def commit(folder: Path) -> Door:
    """Of a checkpoint, with a checksum that is right."""
    own, document = _checkpoint(folder)
    model = Model(width=8, num_heads=1, head_size=8, lora=Lora(2, 2.0, ("q",)))
    now = complete(Config(model=model, run=Run(after=str(folder / "run"))), name="x")
    meta = document["meta"]

    def read(data: bytes) -> None:
        line = data.replace(b"\n", b" ")
        (own / COMMIT_FILE).write_bytes(line + b"\n%d\n" % zlib.crc32(line))
        open_run(now, meta)
        with Checkpointer(own.parent, interval_steps=1) as checkpoints:
            saved = saved_meta(checkpoints)
        assert saved is not None
        refuse_other_model(saved[1]["model"], meta["model"])
        refuse_other_data(saved[1]["data"], meta["data"])
        if why := why_unfit(own) or why_broken(own):
            raise _Broken(why)

    return Door(
        read, ["checkpoint", "meta", "run.after", "d/0", "_METADATA"], [document]
    )


def commit_bytes(folder: Path) -> Door:
    own, document = _checkpoint(folder)
    path = own / COMMIT_FILE
    whole = path.read_bytes()

    def read(data: bytes) -> None:
        path.write_bytes(data)
        why = why_unfit(own) or why_broken(own)
        with Checkpointer(own.parent, interval_steps=1) as checkpoints:
            saved = checkpoints.latest_meta()
        assert (saved is None) == (why is not None)
        if why is not None:
            raise _Broken(why)
        assert saved == (7, document["meta"])

    return Door(read, [COMMIT_FILE], whole=[whole])


def metrics(folder: Path) -> Door:
    path = folder / "metrics.jsonl"
    document = {"step": 3, "loss": 1.5, "seconds": 0.5, "validation_loss": 2.0}
    line = json.dumps(document).encode() + b"\n"

    def read(data: bytes) -> None:
        path.write_bytes(line + data + b"\n" + line)
        rows = read_rows(path)
        for row in rows:
            assert "step" in row
            for value in row.values():
                f"{value:,.1f}", np.float64(value)

    return Door(read, [path.name], [document], [line])


def events(folder: Path) -> Door:
    """Of a run's folder, from which its page is made."""
    (folder / "config.yaml").write_text("training: {num_steps: 9}")
    row = {"step": 3, "loss": 1.5, "seconds": 0.5, "unix_seconds": 1.8e9}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    path = folder / "events.jsonl"
    common = {"unix_seconds": 1.8e9, "step": 3}
    documents = [
        common | {"event": "started", "processes": 2, "seconds": 1.0},
        common | {"event": "saved", "seconds": 1.0, "to_step": 3},
        common | {"event": "failed", "why": "<script>alert(1)</script>"},
    ]
    whole = [json.dumps(each).encode() + b"\n" for each in documents]

    def read(data: bytes) -> None:
        path.write_bytes(whole[0] + data + b"\n" + whole[1])
        assert "<script>alert" not in page(read_runs([folder]))

    return Door(read, [path.name], documents, whole, share=2)


def call(folder: Path) -> Door:
    """Of another process of a pod, or of whoever calls its port."""
    document = {"process": 1, "of": 3, "host": "a"}

    def read(data: bytes) -> None:
        one, other = socket.socketpair()
        with one, other, closing(roll_call._Roll(one, 3)) as roll:
            found = roll._take(data, one)
            assert found in (None, 1, 2) and len(roll.missing()) == 2 - bool(found)

    return Door(read, ["process"], [document], [json.dumps(document).encode()])


def prompt(folder: Path) -> Door:
    """Of generate: ids, and a file of text."""
    path = folder / "prompt.txt"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        text = file_text(path)
        found = ids_of(text.strip("[] "))
        assert all(isinstance(each, int) for each in found)

    return Door(read, ["--prompt-"], [[1, 2, 3]], [b"1, 2,3", b"12"])


DOORS: tuple[Callable[[Path], Door], ...] = (
    config,
    command_line,
    index,
    ends,
    unfinished,
    dataset,
    splits,
    lines,
    zipped,
    table,
    arrow,
    chat,
    template,
    tokenizer_config,
    generation_config,
    tokenizer,
    header,
    safetensors,
    model_index,
    model_config,
    commit,
    commit_bytes,
    metrics,
    events,
    call,
    prompt,
)
