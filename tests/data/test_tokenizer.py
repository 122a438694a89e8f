"""Text to tokens: bytes, and a folder's tokenizer.json."""

import json

import pytest
from word_tokenizer import write_tokenizer

from ulysses_jax.data.tokenizer import Bytes, Folder, check_vocabulary, tokenizer_of


@pytest.fixture
def folder(tmp_path):
    write_tokenizer(tmp_path)
    return tmp_path


def test_a_folders_own(folder):
    tokenizer = tokenizer_of(folder)
    assert tokenizer.encode("a long long text") == [0, 2, 3, 3, 4]  # whole, not padded
    assert tokenizer.decode([0, 2, 3, 1]) == "a long"
    assert (tokenizer.num_ids, tokenizer.ends) == (6, (1,))
    check_vocabulary(6, tokenizer)
    with pytest.raises(ValueError, match="model.vocab_size 5 is less than the 6 ids"):
        check_vocabulary(5, tokenizer)
    (folder / "generation_config.json").unlink()
    assert tokenizer_of(folder).ends == ()
    for said in ("</s>", {"content": "</s>"}):
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": said}))
        assert tokenizer_of(folder).ends == (1,)
    (folder / "config.json").write_text('{"eos_token_id": [1, 4]}')
    tokenizer = tokenizer_of(folder)
    assert tokenizer.ends == (1, 4)
    assert isinstance(tokenizer, Folder)
    (folder / "copy").mkdir()
    tokenizer.copy_to(folder / "copy")
    assert tokenizer_of(folder / "copy").ends == (1, 4)


def test_a_copy_has_all_that_goes_along(folder, tmp_path):
    """Bytes as they were, and none of it where bytes are the tokens."""
    for name in ("chat_template.jinja", "tokenizer_config.json", "vocab.txt"):
        (folder / name).write_text(f'{{"{name}": 1}}')
    (folder / "generation_config.json").write_text('{"eos_token_id": 1, "top_k": 3}')
    names = {each.name for each in folder.iterdir()}
    (folder / "config.json").write_text("{}")
    copy = tmp_path / "copy"
    copy.mkdir()
    tokenizer_of(folder).copy_to(copy)
    assert {each.name for each in copy.iterdir()} == names
    for name in names:
        assert (copy / name).read_bytes() == (folder / name).read_bytes()
    (copy / "config.yaml").write_text("")
    Bytes().copy_to(copy)
    assert [each.name for each in copy.iterdir()] == ["config.yaml"]


def test_bytes(tmp_path):
    tokenizer = tokenizer_of(tmp_path)
    assert isinstance(tokenizer, Bytes)
    assert tokenizer.encode("aé") == [97, 195, 169]
    assert tokenizer.decode([97, 195, 169, 256, 195]) == "aé\N{REPLACEMENT CHARACTER}"
    with pytest.raises(ValueError, match="model.vocab_size 256 is less than the 257"):
        check_vocabulary(256, tokenizer)


def test_what_is_no_tokenizer(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ValueError, match="has tokenizer.model and no tokenizer.json"):
        tokenizer_of(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="is no tokenizer"):
        tokenizer_of(tmp_path)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tekken.json"])
def test_other_tokenizers_are_not_taken_for_bytes(tmp_path, name):
    (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=f"has {name} and no tokenizer.json"):
        tokenizer_of(tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"eos', "generation_config.json is no JSON: "),
        ("[1]", "generation_config.json is no JSON object"),
        ('{"eos_token_id": "</s>"}', "eos_token_id '</s>': give an id"),
        ('{"eos_token_id": [1, 6]}', "eos_token_id 6, and its .* has ids 0 to 5"),
    ],
)
def test_ends_that_cannot_be_read(folder, text, message):
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        tokenizer_of(folder)


def test_a_file_larger_than_any_tokenizer(words, monkeypatch):
    """It is refused before it is read."""
    monkeypatch.setattr("ulysses_jax.data.tokenizer._MOST_BYTES", 100)
    with pytest.raises(ValueError, match="json has [0-9,]+ bytes, and .* at most 100"):
        tokenizer_of(words)
