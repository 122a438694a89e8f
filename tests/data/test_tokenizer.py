"""Text to tokens: bytes, and a folder's tokenizer.json."""

import json

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from ulysses_jax.data.tokenizer import Bytes, check_vocabulary, tokenizer_of

WORDS = {"<s>": 0, "</s>": 1, "a": 2, "long": 3, "text": 4, "?": 5}


@pytest.fixture
def folder(tmp_path):
    """One that begins a text with <s>, and would cut it after two tokens."""
    made = tokenizers.Tokenizer(models.WordLevel(WORDS, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    made.add_special_tokens(["<s>", "</s>"])
    made.enable_truncation(2)
    made.enable_padding(length=9)
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 1}))
    return tmp_path


def test_a_folders_own(folder):
    tokenizer = tokenizer_of(folder)
    assert tokenizer.encode("a long long text") == [0, 2, 3, 3, 4]  # whole, not padded
    assert tokenizer.decode([0, 2, 3, 1]) == "a long"
    assert (tokenizer.num_ids, tokenizer.ends) == (6, (1,))
    check_vocabulary(6, tokenizer)
    with pytest.raises(ValueError, match="model.vocab_size 5 is less than the 6 ids"):
        check_vocabulary(5, tokenizer)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 4]}')
    assert tokenizer_of(folder).ends == (1, 4)


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
