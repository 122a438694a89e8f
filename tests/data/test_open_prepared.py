"""A run on a prepared folder, on tables as they are, and its refusals."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
from corpus_cases import write
from source_cases import json_lines, write_parquet
from test_open import make_config

from ulysses_jax.config import Data, Model, Run
from ulysses_jax.data.open import open_data, refuse_other_data
from ulysses_jax.data.prepare import prepare
from ulysses_jax.data.run_tokenizer import digest_of
from ulysses_jax.data.streams import document_ends, whole_stream
from ulysses_jax.data.tokenizer import Bytes, tokenizer_of


@pytest.fixture
def tables(tmp_path):
    texts = ["a long text " * (1 + i % 7) for i in range(60)] + ["", "?"]
    write(tmp_path / "in", {"a.jsonl": json_lines(texts[:30])})
    write_parquet(tmp_path / "in" / "b.parquet", texts[30:])
    return tmp_path / "in"


def rows_of(rows):
    return [rows.read(i, 0, rows.sequence_tokens) for i in range(len(rows))]


@pytest.mark.parametrize("tokenizer", ["bytes", "words"])
def test_a_prepared_folder_gives_the_rows_of_its_files(
    tmp_path, tables, words, tokenizer
):
    """The same split, order, tokens and labels; its tokenizer is in it."""
    folder = words if tokenizer == "words" else None
    model = Model(vocab_size=320, from_=None if folder is None else str(folder))
    raw = open_data(make_config(tables, model=model))
    prepare(str(tables), tmp_path / "out", folder, shard_tokens=50)
    for from_ in {model.from_, None}:
        again = dataclasses.replace(model, from_=from_)
        data = open_data(make_config(tmp_path / "out", model=again))
        assert data.validation is not None and raw.validation is not None
        for mine, other in ((data.train, raw.train), (data.validation, raw.validation)):
            assert len(mine) > 3
            for left, right in zip(rows_of(mine), rows_of(other), strict=True):
                for name, values in left.items():
                    np.testing.assert_array_equal(values, right[name])
        assert type(data.tokenizer) is type(raw.tokenizer)
        assert data.notes[0].startswith(f"data.files '{tmp_path}/out': train ")
        assert "documents" in data.notes[0]
        assert "skipped 1 document without text" in data.notes
    total = data.train.num_tokens + data.validation.num_tokens
    assert data.validation.num_tokens == int(np.ceil(0.2 * total))
    (hint,) = [note for note in raw.notes if "ulysses_jax.data prepare" in note]
    assert "every start reads and tokenises all of it" in hint
    assert not [note for note in data.notes if "ulysses_jax.data prepare" in note]


def test_a_run_goes_on_with_the_same_tokens_only(tmp_path, tables, words):
    prepare(str(tables), tmp_path / "out", words)
    config = make_config(tmp_path / "out", model=Model(vocab_size=6))
    saved = json.loads(json.dumps(open_data(config).meta))
    refuse_other_data(saved, open_data(config).meta, config)
    assert saved["tokenizer"] == digest(words)
    write(tables, {"c.txt": b"a"})
    prepare(str(tables), tmp_path / "more", words)
    other = make_config(tmp_path / "more", model=Model(vocab_size=6))
    with pytest.raises(ValueError, match="number of documents was 61, is 62"):
        refuse_other_data(saved, open_data(other).meta, other)
    with pytest.raises(ValueError, match="bytes that validate was absent"):
        raw = Model(vocab_size=6, from_=str(words))
        text = make_config(tables / "c.txt", data=TEXT(tables), model=raw)
        refuse_other_data(saved, open_data(text).meta, text)
    # Of tables as they are, too: another field is other data.
    raw = make_config(tables)
    saved = open_data(raw).meta
    write(tables, {"a.jsonl": json_lines(["other"])})
    with pytest.raises(ValueError, match="fingerprint was"):
        refuse_other_data(saved, open_data(raw).meta, raw)


def TEXT(folder):
    return Data(files=str(folder / "c.txt"), validation_fraction=0)


def digest(folder):
    return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()


def test_another_tokenizer_is_refused(tmp_path, tables, words):
    prepare(str(tables), tmp_path / "out", words)
    prepare(str(tables), tmp_path / "bytes")
    other = tmp_path / "other"
    other.mkdir()
    text = (words / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"long"', '"short"'))
    of = Model(vocab_size=320, from_=str(other))
    with pytest.raises(ValueError, match=f"with the tokenizer {digest(words)} of 6 .*"):
        open_data(make_config(tmp_path / "out", model=of))
    with pytest.raises(ValueError, match="tokenizer bytes of 257 .*er .*/other"):
        open_data(make_config(tmp_path / "bytes", model=of))
    # A run that this one goes on from reads bytes, or another one's.
    (tmp_path / "before").mkdir()
    after = Run(folder=str(tmp_path / "run"), after=str(tmp_path / "before"))
    open_data(make_config(tmp_path / "bytes", run=after))
    with pytest.raises(ValueError, match="before has bytes: .*er bytes"):
        open_data(make_config(tmp_path / "out", run=after))
    with pytest.raises(ValueError, match="vocab_size 5 is less than the 6 ids"):
        open_data(make_config(tmp_path / "out", model=Model(vocab_size=5)))
    # A folder without a tokenizer reads bytes, too, until one is put into it.
    bare = Model(vocab_size=320, from_=str(tmp_path / "before"))
    open_data(make_config(tmp_path / "bytes", model=bare))
    message = f"{digest(words)} of 6 ids, and .*before has bytes: .*put its tokenizer"
    with pytest.raises(ValueError, match=message):
        open_data(make_config(tmp_path / "out", model=bare))
    (tmp_path / "before" / "tokenizer.json").write_text(text)
    open_data(make_config(tmp_path / "out", model=bare))
    (tmp_path / "out" / "tokenizer.json").write_text(text.replace('"long"', '"short"'))
    with pytest.raises(ValueError, match="is not the one that its tokens were made by"):
        open_data(make_config(tmp_path / "out", model=bare))


def test_the_plan_knows_how_long_prepared_documents_are(tmp_path, tables, words):
    prepare(str(tables), tmp_path / "out", words)
    ends = document_ends(make_config(tmp_path / "out"))
    assert len(ends) == 61 and ends[0] == 5
    with pytest.raises(ValueError, match="prepare counts them"):
        document_ends(make_config(tables))


def test_the_whole_of_a_prepared_folder_is_of_the_models_tokenizer(
    tmp_path, tables, words
):
    """To evaluate on it, too: its ids mean nothing to a model of another one."""
    prepare(str(tables), tmp_path / "out", words)
    own = tokenizer_of(words)
    stream, notes = whole_stream(str(tmp_path / "out"), own, "text", ends=True)
    assert not notes and len(stream.ends) == 61
    other = tmp_path / "other"
    other.mkdir()
    text = (words / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"long"', '"short"'))
    for another in (tokenizer_of(other), Bytes()):
        assert another.num_ids != 6 or digest_of(another) != digest(words)
        with pytest.raises(ValueError, match="was prepared with another tokenizer"):
            whole_stream(str(tmp_path / "out"), another, "text", ends=True)
