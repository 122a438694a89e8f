"""A run's data by its config, its refusals, and several processes."""

import dataclasses
import json
import socket
import subprocess
import sys

import numpy as np
import pytest
from word_tokenizer import END, write_tokenizer

from ulysses_jax.complete import complete
from ulysses_jax.config import Config, Data, Model, Run, Training
from ulysses_jax.data import open as opening
from ulysses_jax.data.open import open_data, refuse_other_data
from ulysses_jax.data.tokenizer import IGNORED


def make_config(files, **kwargs):
    sections = dict(
        data=Data(files=str(files), validation_fraction=0.2),
        training=Training(sequence_tokens=16, batch_size=8),
    )
    return complete(Config(**sections | kwargs), name="test")  # pyright: ignore


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(10):
        (folder / f"{i}.txt").write_bytes(bytes([65 + i]) * (30 + i))
    return folder


def test_a_folder_becomes_rows_of_both_parts(folder):
    data = open_data(make_config(folder))
    assert data.validation is not None
    assert (
        len(data.train.stream.documents) == 8
        and len(data.validation.stream.documents) == 2
    )
    train, validation = (
        {document.name for document in rows.stream.documents}
        for rows in (data.train, data.validation)
    )
    assert len(train | validation) == 10
    assert data.train.names == ("tokens", "labels", "positions", "segment_ids")
    (note,) = data.notes
    assert "train 8 files" in note and "validation 2 files" in note
    tokens = data.train.num_tokens + data.validation.num_tokens
    assert tokens == sum(31 + i for i in range(10))


def test_the_default_is_the_standard_library():
    data = open_data(complete(Config(), name="test"))
    assert data.validation is not None
    assert data.train.num_tokens > 5_000_000
    assert data.validation.num_tokens > 100_000


def test_the_seed_orders_training_and_leaves_validation_alone(folder):
    a, b = (open_data(make_config(folder, run=Run(seed=s))) for s in (0, 1))
    assert a.train.stream.documents != b.train.stream.documents
    assert a.validation and b.validation
    assert a.validation.stream.documents == b.validation.stream.documents


def test_no_validation_and_no_mask(folder):
    off = Data(files=str(folder), validation_fraction=0, mask_documents=False)
    data = open_data(make_config(folder, data=off))
    assert data.validation is None
    assert data.train.names == ("tokens", "labels", "positions")


def test_whole_documents_in_both_parts(folder):
    whole = Data(files=str(folder), validation_fraction=0.2, packing="whole")
    training = Training(sequence_tokens=80, batch_size=2)
    config = make_config(folder, data=whole, training=training)
    data = open_data(config)
    assert data.validation is not None
    for rows in (data.train, data.validation):
        assert [len(rows.lengths(i)) for i in range(len(rows))] == [2] * len(rows)
        assert sum(rows.lengths(i).sum() for i in range(len(rows))) == rows.num_tokens
    padding = f"{1 - data.train.num_tokens / 320:.2%} padding; 0 documents longer"
    assert f"packing whole: 4 rows of 80 tokens, {padding}" in " ".join(data.notes)
    # What an older run or one of a stream has, it has still.
    stream = make_config(folder, training=training)
    assert "data.packing" not in open_data(stream).meta
    with pytest.raises(ValueError, match="data.packing was stream, is whole"):
        refuse_other_data(open_data(stream).meta, data.meta)
    short = Training(sequence_tokens=33, batch_size=2)
    notes = open_data(make_config(folder, data=whole, training=short)).notes
    assert "documents longer than a row, split" in " ".join(notes)


def test_a_small_corpus_is_said_to_be_small(folder):
    training = Training(sequence_tokens=1000, batch_size=8)
    notes = open_data(make_config(folder, training=training)).notes
    assert "1 rows of 1,000, fewer than training.batch_size 8" in notes[-1]


def test_refusals(folder, tmp_path):
    with pytest.raises(ValueError, match="vocab_size 200 is less than the 257 ids"):
        open_data(make_config(folder, model=Model(vocab_size=200)))
    with pytest.raises(ValueError, match="gives no file"):
        open_data(make_config(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="data.validation_fraction 0, or give 2"):
        open_data(make_config(folder / "1.txt"))


def test_a_run_goes_on_with_its_own_data_only(folder):
    config = make_config(folder)
    saved = json.loads(json.dumps(open_data(config).meta))
    refuse_other_data(saved, open_data(config).meta)
    # Neither the mesh nor the accumulation steps change what a batch holds.
    training = dataclasses.replace(config.training, accumulation_steps=2)
    other = dataclasses.replace(
        config, training=training, mesh=dataclasses.replace(config.mesh, seq=8)
    )
    refuse_other_data(saved, open_data(other).meta)

    for section, field, value, message in (
        ("run", "seed", 7, "run.seed was 0, is 7"),
        ("training", "batch_size", 4, "training.batch_size was 8, is 4"),
        ("training", "sequence_tokens", 8, "training.sequence_tokens was 16, is 8"),
        ("data", "mask_documents", False, "data.mask_documents was True, is False"),
        ("data", "validation_fraction", 0.5, "data.validation_fraction was 0.2, is"),
    ):
        part = dataclasses.replace(getattr(config, section), **{field: value})
        meta = open_data(dataclasses.replace(config, **{section: part})).meta
        with pytest.raises(
            ValueError, match=f"\\({message}.*\\): go back .*run.folder"
        ):
            refuse_other_data(saved, meta)

    (folder / "3.txt").write_bytes(b"longer" * 100)
    with pytest.raises(ValueError, match=r"bytes was 345, is 912; fingerprint was"):
        refuse_other_data(saved, open_data(config).meta)
    with pytest.raises(ValueError, match="run.seed was absent, is 0"):
        refuse_other_data({}, open_data(config).meta)


def test_the_remedy_for_other_data_is_a_folder_that_is_free(folder, tmp_path):
    """README's second command reads other files into the folder of its first."""
    config = make_config(folder, run=Run(folder=str(tmp_path / "tiny")))
    saved = open_data(config).meta
    (tmp_path / "tiny").mkdir()
    books = write_books(tmp_path)
    other = make_config(books / "*.txt", run=config.run)
    expected = [tmp_path / "books-2", tmp_path / "books-3"]
    for free in expected:
        with pytest.raises(ValueError, match=f"--run.folder {free}$"):
            refuse_other_data(saved, open_data(other).meta, other)
        free.mkdir()
    # The same files in other batches.
    training = dataclasses.replace(config.training, batch_size=4)
    other = dataclasses.replace(config, training=training)
    with pytest.raises(ValueError, match=f"--run.folder {tmp_path}/tiny-2$"):
        refuse_other_data(saved, open_data(other).meta, other)


def write_books(tmp_path):
    books = tmp_path / "books"
    books.mkdir()
    for name in "abc":
        (books / f"{name}.txt").write_text("a line of text\n" * 100)
    return books


def test_a_cut_file_is_said_and_known_again(tmp_path):
    config = make_config(
        write_books(tmp_path), data=Data(files=str(tmp_path), validation_fraction=0.05)
    )
    data = open_data(config)
    assert (
        "train 3 files, 4,278 tokens; validation 1 file, 226 tokens (5.0%)"
        in (data.notes[0])
    )
    assert "the last 225 bytes validate, the 1,275 before them train" in data.notes[1]
    # The same files parted in another way, as by another version, are other data.
    saved = data.meta | {"bytes that validate": 1500}
    with pytest.raises(ValueError, match="bytes that validate was 1500, is 225"):
        refuse_other_data(saved, data.meta, config)


def test_a_runs_own_folder_is_no_part_of_its_corpus(folder):
    """Or the run could not resume: its files would be others than when it started."""
    config = make_config(folder, run=Run(folder=str(folder / "runs" / "x")))
    saved = open_data(config).meta
    (folder / "runs" / "x").mkdir(parents=True)
    (folder / "runs" / "x" / "config.yaml").write_text(config.to_yaml())
    refuse_other_data(saved, open_data(config).meta, config)


PROGRAM = """
import sys
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
port, rank, out, same, other = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))
from jax.sharding import NamedSharding, PartitionSpec
from ulysses_jax.complete import complete
from ulysses_jax.config import Config, Data, Training
from ulysses_jax.data.loader import batches
from ulysses_jax.data.open import open_data
from ulysses_jax.mesh import make_mesh

def opened(files):
    data = Data(files=files, validation_fraction=0.2)
    training = Training(sequence_tokens=16, batch_size=8)
    return open_data(complete(Config(data=data, training=training), name="x"))

spec = PartitionSpec(None, ("data", "fsdp"), ("ring", "seq"))
rows = opened(same).train
parts = {}
by_host = make_mesh(data=2, seq=4)
# Each process has half of the tokens of every row, and rows of both data groups.
mixed = by_host.devices.reshape(2, 2, 2).swapaxes(0, 1).reshape(by_host.devices.shape)
mixed = jax.sharding.Mesh(mixed, by_host.axis_names)
for number, mesh in enumerate((by_host, make_mesh(seq=8), mixed)):
    stream = batches(rows, (1, 8, 16), NamedSharding(mesh, spec), seed=3, start_step=4)
    for name, values in next(stream).items():
        for i, shard in enumerate(values.addressable_shards):
            parts[f"{number} {name} {i}"] = shard.data
            parts[f"{number} {name} {i} at"] = [
                s.indices(n)[:2] for s, n in zip(shard.index, values.shape)
            ]
    stream.close()
np.savez(f"{out}/{rank}.npz", **parts)

for files in ((same, other), (same, "/missing")):
    try:
        opened(files[int(rank)])
    except ValueError as error:
        print("refused:", error, flush=True)
jax.distributed.shutdown()
"""


def test_two_processes_make_the_batches_of_one(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "a").write_bytes(b"abc")
    (other / "b").write_bytes(b"abc")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [str(tmp_path), str(folder), str(other)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(port), str(rank), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs

    rows = open_data(make_config(folder)).train
    whole = one_process(rows)
    for rank in range(2):
        parts = np.load(tmp_path / f"{rank}.npz")
        shards = [name for name in parts.files if not name.endswith(" at")]
        assert len(shards) == 3 * 4 * 4
        for shard in shards:
            where = tuple(slice(*bounds) for bounds in parts[f"{shard} at"])
            np.testing.assert_array_equal(parts[shard], whole[shard.split()[1]][where])

    for rank, (out, _) in enumerate(outputs):
        lines = out.splitlines()
        differs, missing = (line for line in lines if line.startswith("refused:"))
        assert "differ between process 0 and processes [1] of 2" in differs
        if rank == 0:
            assert "processes [1] of 2 cannot open data.files" in missing
        else:
            assert "'/missing' gives no file" in missing


def test_what_differs_between_processes_is_named(monkeypatch):
    """Also where the files are the same, and the tokenizer is not."""
    said = {"fingerprint": "f", "tokenizer": "here", "data.mask_documents": True}
    others = [json.dumps(said | {"tokenizer": "there"}).encode()]

    def gather(x):
        both = [x, np.int32(len(others[0]))]
        if np.ndim(x):
            both = [x, np.frombuffer(others[0].ljust(len(x)), np.uint8)]
        return np.stack(both)

    monkeypatch.setattr(opening.multihost_utils, "process_allgather", gather)
    with pytest.raises(
        ValueError, match=r"processes \[1\] of 2 \(tokenizer is there, t"
    ):
        opening._check_same_everywhere(said)
    others = [json.dumps(said).encode()]
    opening._check_same_everywhere(said)


def one_process(rows):
    from test_loader import take

    (batch,) = take(
        rows, 1, degrees=dict(data=8), shape=(1, 8, 16), seed=3, start_step=4
    )
    return batch


def test_tokens_of_the_folder_that_a_run_starts_from(folder, tmp_path):
    """Each document ends with the id that ends one; a row may begin inside of it."""
    source = tmp_path / "model"
    source.mkdir()
    write_tokenizer(source)
    for path in folder.iterdir():
        path.write_text("a long text " * 3 + "?")
    model = Model(vocab_size=6, from_=str(source))
    config = make_config(folder, model=model, run=Run(folder=str(tmp_path / "run")))
    data = open_data(config)
    assert data.train.num_tokens == 8 * 12
    first = data.train.read(0, 0, 16)
    document = [0, 2, 3, 4, 2, 3, 4, 2, 3, 4, 5, END]
    assert first["tokens"].tolist() == document + document[:4]
    labels = [*document[1:], IGNORED, *document[1:5]]
    assert first["labels"].tolist() == labels
    assert first["positions"].tolist() == [*range(12), *range(4)]
    assert first["segment_ids"].tolist() == [1] * 12 + [2] * 4
    part = data.train.read(1, 5, 12)
    whole = data.train.read(1, 0, 16)
    assert all((part[name] == whole[name][5:12]).all() for name in data.train.names)
    assert f"tokens: of {source}/tokenizer.json" in data.notes

    saved = json.loads(json.dumps(data.meta))
    (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)
    data.tokenizer.copy_to(tmp_path / "run")  # as a run does
    text = (source / "tokenizer.json").read_text()
    (source / "tokenizer.json").write_text(text.replace('"long"', '"short"'))
    refuse_other_data(saved, open_data(config).meta)
    elsewhere = make_config(folder, model=model)
    with pytest.raises(ValueError, match="on other batches .tokenizer was"):
        refuse_other_data(saved, open_data(elsewhere).meta)
    small = make_config(folder, model=dataclasses.replace(model, vocab_size=5))
    with pytest.raises(ValueError, match="vocab_size 5 is less than the 6 ids"):
        open_data(small)
