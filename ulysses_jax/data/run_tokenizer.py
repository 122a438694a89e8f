"""Which tokenizer a run has: its own, that of where it starts from, or of its data."""

import hashlib
from pathlib import Path
from typing import Any

from ulysses_jax.config import Config
from ulysses_jax.data.tokenizer import Bytes, Tokenizer, check_vocabulary, tokenizer_of


def tokenizer_of_run(config: Config) -> tuple[Tokenizer, Path | None]:
    """Of the run's own folder, where it has saved a step, else of where it starts
    from; and the folder, None where none of them has one: then bytes."""
    own = config.run.folder
    began = own is not None and any(Path(own, "checkpoints").glob("[0-9]*"))
    for folder in (own if began else None, config.run.after, config.model.from_):
        if folder is not None:
            tokenizer = tokenizer_of(Path(folder))
            if not isinstance(tokenizer, Bytes):
                return tokenizer, Path(folder)
    return Bytes(), None


def tokenizer_of_prepared(
    config: Config, index: dict[str, Any], path: Path
) -> Tokenizer:
    """That of a prepared folder, which must be the run's, where that has one.

    Raises:
      ValueError: the run's is another, or its model has fewer ids.
    """
    tokenizer = tokenizer_of(path)
    if digest_of(tokenizer) != index["tokenizer"]:
        raise ValueError(
            f"the tokenizer.json of {path} is not the one that its tokens were made "
            f"by (sha256 {index['tokenizer']}): put that back, or prepare the files "
            "again"
        )
    own, folder = tokenizer_of_run(config)
    # Where a model starts from says what it reads: bytes, where no tokenizer is there.
    where = folder or config.run.after or config.model.from_
    if where is not None and digest_of(own) != index["tokenizer"]:
        theirs = f" of {own.num_ids:,} ids" * (folder is not None)
        put = f"; or put its tokenizer.json into {where}, if it is that model's"
        raise ValueError(
            f"data.files {path} was prepared with the tokenizer {index['tokenizer']} "
            f"of {index['num_ids']:,} ids, and {where} has {digest_of(own)}{theirs}: "
            f"prepare the files with --tokenizer {folder or 'bytes'}, or start from "
            "the model that they were prepared for" + put * (folder is None)
        )
    if config.model.vocab_size < index["num_ids"]:
        raise ValueError(
            f"model.vocab_size {config.model.vocab_size} is less than the "
            f"{index['num_ids']:,} ids of the tokenizer that {path} was prepared with: "
            f"use {index['num_ids']:,} or more, or prepare the files with the model's "
            "own"
        )
    check_vocabulary(config.model.vocab_size, tokenizer)
    return tokenizer


def digest_of(tokenizer: Tokenizer) -> str:
    """`bytes`, or the sha256 of tokenizer.json."""
    if isinstance(tokenizer, Bytes):
        return "bytes"
    return hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()
