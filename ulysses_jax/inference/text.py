"""Text of tokens that come one by one, and prompts of text."""

from collections.abc import Sequence
from pathlib import Path

from ulysses_jax.data.chats import template_of
from ulysses_jax.data.tokenizer import Bytes, Tokenizer

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
      ValueError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise ValueError(
            f"--prompt-file {path} cannot be read ({error.strerror}): give a file of "
            "text, or the text itself, --prompt TEXT"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--prompt-file {path} is not UTF-8 ({error}): iconv -t utf-8 makes it so"
        ) from None


def encoded(tokenizer: Tokenizer, text: str, *, around: bool = True) -> list[int]:
    """Args: around: with what the tokenizer puts around a text.

    Raises:
      ValueError: text of bytes that are no letters, as a shell may give it.
    """
    try:
        if around:
            return tokenizer.encode(text)
        return tokenizer.encode_with_places(text, around=False)[0]
    except UnicodeEncodeError:
        raise ValueError(
            f"--prompt {text!r} is not UTF-8: give it as a file of UTF-8, --prompt-file"
        ) from None


def asked(
    folder: Path, tokenizer: Tokenizer, texts: Sequence[str]
) -> tuple[list[list[int]], tuple[int, ...]]:
    """Texts as what a user says, by the folder's chat template, up to where the answer
    begins; and the ids that end an answer: the tokenizer's own, and the sign that the
    template writes behind one.

    Raises:
      ValueError: there is no template, or it raises.
    """
    if isinstance(tokenizer, Bytes):
        raise ValueError(
            f"--chat asks by a chat template, and the tokens of {folder} are bytes, "
            "which have none: leave --chat out, or give a folder with a tokenizer.json"
        )
    template = template_of(folder)
    prompts = []
    for text in texts:
        messages = [{"role": "user", "content": text}]
        prompt = template.render(messages, add_generation_prompt=True).text
        prompts.append(encoded(tokenizer, prompt, around=False))
    answer = "An answer."
    messages = [
        {"role": "user", "content": "A question?"},
        {"role": "assistant", "content": answer},
    ]
    _, _, behind = template.render(messages).text.rpartition(answer)
    sign = encoded(tokenizer, behind.lstrip(), around=False)[:1]
    is_sign = sign and not tokenizer.decode(sign)  # it is no word
    return prompts, (*tokenizer.ends, *(sign if is_sign else ()))
