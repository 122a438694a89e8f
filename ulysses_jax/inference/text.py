"""Text of tokens that come one by one, and prompts of text."""

from collections.abc import Sequence
from pathlib import Path

from ulysses_jax.data.tokenizer import Tokenizer

# Of the prompt, which says whether the first new token begins a word, or ends a letter.
_CONTEXT_TOKENS = 8
_BROKEN = "\ufffd"


class Spelled:
    """What new tokens add to a text: a letter appears once all of its tokens are there.

    Source: the two offsets of vLLM's incremental detokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]):
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_CONTEXT_TOKENS:])
        self._first, self._read = 0, len(self._ids)

    def add(self, token: int) -> str:
        self._ids.append(token)
        text = self._text(len(self._ids))
        return "" if text.endswith(_BROKEN) else self._taken(text)

    def rest(self) -> str:
        """Of letters that stayed incomplete."""
        return self._taken(self._text(len(self._ids)))

    def _taken(self, text: str) -> str:
        new = text[len(self._text(self._read)) :]
        self._first, self._read = self._read, len(self._ids)
        return new

    def _text(self, end: int) -> str:
        return self._tokenizer.decode(self._ids[self._first : end])


def ids_of(text: str) -> list[int]:
    """Of `1,2,3`.

    Raises:
      ValueError: it is something else.
    """
    try:
        return [int(word) for word in text.split(",")] if text.strip() else []
    except ValueError:
        raise ValueError(f"--prompt-tokens {text!r} are no ids: give 1,2,3") from None


def file_text(path: Path) -> str:
    """A file's, whole.

    Raises:
      ValueError: it is not UTF-8.
      OSError: it cannot be read.
    """
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--prompt-file {path} is not UTF-8 ({error}): iconv -t utf-8 makes it so"
        ) from None


def encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    """Raises ValueError: text of bytes that are no letters, as a shell may give it."""
    try:
        return tokenizer.encode(text)
    except UnicodeEncodeError:
        raise ValueError(
            f"--prompt {text!r} is not UTF-8: give it as a file of UTF-8, --prompt-file"
        ) from None
