"""What text is as tokens: bytes, or what a folder's tokenizer.json says."""

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import tokenizers

from ulysses_jax.data.shards import write_bytes
from ulysses_jax.data.tokenizer_claims import refuse_large
from ulysses_jax.outside import check_inside, parsed, read_bounded, read_object

END_OF_DOCUMENT = 256
NUM_IDS = 257

IGNORED = -1
"""The label of a token that has none."""


class Bytes:
    """Bytes of UTF-8 are the tokens: ids 0 to 255, and one more that ends a document.

    Attributes:
      num_ids: of all that it makes; a model has as many or more.
      ends: ids that end a text, the first of them a document; none: nothing says which.
    """

    num_ids = NUM_IDS
    ends = (END_OF_DOCUMENT,)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_with_places(
        self, text: str, *, around: bool
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and where in the text each stands: (start, stop) in characters."""
        letters = [len(letter.encode()) for letter in text]
        places = [(i, i + 1) for i, num in enumerate(letters) for _ in range(num)]
        return self.encode(text), places

    def copy_to(self, folder: Path) -> None:
        """So that `tokenizer_of(folder)` is this one: it has no other."""
        for path in files_of(folder):
            path.unlink()

    def decode(self, ids: Sequence[int]) -> str:
        """Of ids that are no byte, nothing; of a broken character, its sign."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class Folder:
    """A folder's tokenizer.json; attributes as of `Bytes`.

    Attributes:
      path: of that file.

    Raises:
      ValueError: it cannot be read.
    """

    def __init__(self, folder: Path):
        path = folder / _FILE
        data = read_bounded(path, _MOST_BYTES)
        refuse_large(parsed(data, f"{path} is no tokenizer: it"), path)
        with _in_words(path, "is no tokenizer"):
            self._own = tokenizers.Tokenizer.from_buffer(data)
        self._own.no_truncation()
        self._own.no_padding()
        self.path = path
        ids = self._own.get_vocab(with_added_tokens=True).values()
        if not ids:
            raise ValueError(f"{path} has no token: take the model's own")
        self.num_ids = 1 + max(ids)
        self.ends = _ends(folder) or self._end_by_name(folder)
        if wrong := [end for end in self.ends if not 0 <= end < self.num_ids]:
            raise ValueError(
                f"{folder} has eos_token_id {wrong[0]}, and its {_FILE} has ids 0 to "
                f"{self.num_ids - 1}: take both from one model"
            )

    def _end_by_name(self, folder: Path) -> tuple[int, ...]:
        """Of the token that tokenizer_config.json says, where no file says its id."""
        path = folder / "tokenizer_config.json"
        if not path.is_file():
            return ()
        said: Any = read_object(path).get("eos_token")
        name = said.get("content") if isinstance(said, dict) else said
        end = self._own.token_to_id(name) if isinstance(name, str) else None
        return () if end is None else (end,)

    def encode(self, text: str) -> list[int]:
        """With what the tokenizer puts around a text, such as a token to begin with."""
        with self._at_work():
            return self._own.encode(text).ids

    def encode_with_places(
        self, text: str, *, around: bool
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """As of `Bytes`; what is put around a text (around: it is) stands nowhere:
        (0, 0)."""
        with self._at_work():
            encoding = self._own.encode(text, add_special_tokens=around)
            return encoding.ids, encoding.offsets

    def copy_to(self, folder: Path) -> None:
        """So that `tokenizer_of(folder)` is this one, and has its chat template."""
        if self.path.parent == folder:
            return
        for path in files_of(self.path.parent):
            check_inside(path)
            write_bytes(folder / path.name, path.read_bytes())
        if _ends(folder) == self.ends and self.ends:
            return
        own = folder / _ENDS  # they were said elsewhere
        said = read_object(own) if own.is_file() else {}
        said["eos_token_id"] = list(self.ends) or None
        write_bytes(own, json.dumps(said).encode())

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Special tokens by their names (special: they are), or left out."""
        with self._at_work():
            return self._own.decode(list(ids), skip_special_tokens=not special)

    def _at_work(self) -> AbstractContextManager[None]:
        return _in_words(self.path, "fails at a text")


@contextmanager
def _in_words(path: Path, what: str) -> Iterator[None]:
    """What the library raises, as a ValueError with the file's name."""
    try:
        yield
    except (UnicodeEncodeError, MemoryError):
        raise  # of the text, of the machine
    except BaseException as error:
        # Where its Rust code panics it raises what is no Exception, nor to be imported.
        if (
            not isinstance(error, Exception)
            and type(error).__name__ != "PanicException"
        ):
            raise
        raise ValueError(f"{path} {what}: {error}: take the model's own") from None


Tokenizer = Bytes | Folder

_MOST_BYTES = 2**28  # seven times those of 262,144 ids
_FILE, _ENDS = "tokenizer.json", "generation_config.json"
# What tokenizers lie in: also those that this does not read are no bytes.
_OWN = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "tekken.json",
    "spiece.model",
    "*.tiktoken",
)
_BESIDE = (_ENDS, "chat_template*", "special_tokens_map.json", "added_tokens.json")


def files_of(folder: Path) -> list[Path]:
    """Of a folder's tokenizer and who writes with it: all that goes along with it."""
    found = {path for each in (*_OWN, *_BESIDE) for path in folder.glob(each)}
    return sorted(path for path in found if path.is_file())


def tokenizer_of(folder: Path) -> Tokenizer:
    """A Hugging Face folder's own; bytes where it has none, as a run's.

    Raises:
      ValueError: it cannot be read, or is in a format that this does not read.
    """
    if (folder / _FILE).is_file():
        return Folder(folder)
    others = sorted(path.name for each in _OWN for path in folder.glob(each))
    if others:
        raise ValueError(
            f"{folder} has {', '.join(others)} and no {_FILE}: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder), of "
            "transformers, writes it"
        )
    return Bytes()


def _ends(folder: Path) -> tuple[int, ...]:
    """As generation_config.json says, else config.json.

    Raises:
      ValueError: a file that cannot be read, or whose eos_token_id is no ids.
    """
    for name in (_ENDS, "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        said: Any = read_object(path).get("eos_token_id")
        ids = said if isinstance(said, list) else [said]
        if said is None:
            continue
        if not all(type(each) is int for each in ids):
            raise ValueError(
                f"{path} has eos_token_id {said!r}: give an id, a list of ids, or null"
            )
        return tuple(ids)
    return ()


def check_vocabulary(vocab_size: int, tokenizer: Tokenizer | None = None) -> None:
    """Raises ValueError where a model has fewer ids than the tokenizer makes.

    Args:
      tokenizer: None: bytes, as of a run.
    """
    if isinstance(tokenizer, Folder):
        if vocab_size < tokenizer.num_ids:
            raise ValueError(
                f"model.vocab_size {vocab_size} is less than the {tokenizer.num_ids} "
                f"ids of the folder's {_FILE}: use the tokenizer that the model was "
                "trained with"
            )
    elif vocab_size < NUM_IDS:
        raise ValueError(
            f"model.vocab_size {vocab_size} is less than the {NUM_IDS} ids of the byte "
            f"tokenizer (256 bytes and the end of a document): use {NUM_IDS} or more, "
            "e.g. 320, which divides over more mesh.tensor degrees"
        )
