"""Rows of documents that a folder's tokenizer made."""

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from ulysses_jax.data.corpus import Document
from ulysses_jax.data.ids import data_of, hold
from ulysses_jax.data.rows import Rows
from ulysses_jax.data.tokenizer import IGNORED, Folder
from ulysses_jax.data.tokens import TokenStream

WORDS = {word: number for number, word in enumerate("abcdefgh")}


@pytest.fixture
def tokenizer(tmp_path):
    made = tokenizers.Tokenizer(models.WordLevel(WORDS | {"?": 8}, "?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    return Folder(tmp_path)


def document(folder, name, text):
    (folder / name).write_text(text)
    return Document(name, folder / name, len(text))


def test_no_id_is_added_and_none_is_lost(tmp_path, tokenizer):
    texts = ["a b c", "   ", "d", "e f g h a"]
    documents = [document(tmp_path, str(i), text) for i, text in enumerate(texts)]
    tokens = hold(map(data_of, documents), tokenizer, None)
    rows = Rows(TokenStream(tokens), 4, mask_documents=True)
    assert (rows.num_tokens, len(rows)) == (9, 3)
    read = [rows.read(row, 0, 5) for row in range(3)]
    want = {
        "tokens": [[0, 1, 2, 3, 0], [4, 5, 6, 7, 0], [0, 0, 0, 0, 0]],
        "labels": [[1, 2, -1, -1, -1], [5, 6, 7, 0, -1], [-1] * 5],
        "positions": [[0, 1, 2, 0, 0], [0, 1, 2, 3, 0], [0] * 5],
        "segment_ids": [[1, 1, 1, 2, 0], [1, 1, 1, 1, 0], [1, 0, 0, 0, 0]],
    }
    for name, values in want.items():
        assert [each[name].tolist() for each in read] == values, name
    for row in range(3):  # a part is that part of the whole
        part = rows.read(row, 1, 4)
        for name, values in part.items():
            np.testing.assert_array_equal(values, read[row][name][1:4])
    assert IGNORED == -1


def test_no_token_at_all(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="makes no token of 1 documents"):
        hold([b"  "], tokenizer, None)
