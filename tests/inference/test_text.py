"""Text of tokens as they come, and prompts."""

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from ulysses_jax.data.tokenizer import Bytes, tokenizer_of
from ulysses_jax.inference.text import Spelled, encoded, file_text, ids_of


def spelled(tokenizer, prompt, new):
    text = Spelled(tokenizer, prompt)
    return [*(text.add(token) for token in new), text.rest()]


def test_a_letter_appears_when_it_is_whole():
    ids = list("aé€😀".encode())
    parts = spelled(Bytes(), list(b"a prompt"), ids)
    assert parts == ["a", "", "é", "", "", "€", "", "", "", "😀", ""]


def test_a_letter_that_the_prompt_began():
    parts = spelled(Bytes(), list("né".encode())[:-1], [0xA9, ord("e")])
    assert "".join(parts)[-1] == "e"


def test_what_stayed_incomplete_is_shown_at_the_end():
    assert spelled(Bytes(), [], [97, 0xE2, 0x82]) == ["a", "", "", "\ufffd"]
    assert "".join(spelled(Bytes(), [], [97, 0xFF, 98, 99])) == "a\ufffdbc"


def test_words_are_apart_after_a_prompt(tmp_path):
    """A tokenizer that drops the space of a text's first word."""
    words = {"▁a": 0, "▁long": 1, "▁text": 2, "er": 3}
    made = tokenizers.Tokenizer(models.WordLevel(words, unk_token="er"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.save(str(tmp_path / "tokenizer.json"))
    parts = spelled(tokenizer_of(tmp_path), [0] * 20, [1, 3, 2])
    assert parts == [" long", "er", " text", ""]


def test_prompts(tmp_path):
    assert ids_of("1, 2,3") == [1, 2, 3] and ids_of("") == []
    with pytest.raises(ValueError, match="'1;2' are no ids: give 1,2,3"):
        ids_of("1;2")
    (tmp_path / "a").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="is not UTF-8"):
        file_text(tmp_path / "a")
    with pytest.raises(ValueError, match="is not UTF-8"):
        encoded(Bytes(), "\udcff")
