"""What tests of several files are given."""

import pytest
from word_tokenizer import write_tokenizer


@pytest.fixture
def words(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    write_tokenizer(folder)
    return folder
