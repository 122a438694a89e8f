"""A run's data by its config, and what a resumed run must find again."""

import dataclasses
import hashlib
import itertools
import json
import os
import shlex
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ulysses_jax.config import Config
from ulysses_jax.data.corpus import find_documents, kind_of, root_of
from ulysses_jax.data.mixture import MixedRows
from ulysses_jax.data.packed_rows import PackedRows
from ulysses_jax.data.prepared import PreparedTokens, fingerprint_of, is_prepared
from ulysses_jax.data.rows import Rows
from ulysses_jax.data.run_tokenizer import (
    digest_of,
    tokenizer_of_prepared,
    tokenizer_of_run,
)
from ulysses_jax.data.span_rows import RowsByLength, rows_by_length
from ulysses_jax.data.split import fingerprint
from ulysses_jax.data.stream import Stream
from ulysses_jax.data.streams import held_records, streams_of_text, streams_of_tokens
from ulysses_jax.data.tokenizer import Bytes, Tokenizer, check_vocabulary

# What `RunData.meta` leaves out.
_UNSAID = {"data.packing": "stream", "tokenizer": "bytes", "tokens that end": []}


@dataclasses.dataclass(frozen=True)
class RunData:
    """What a run reads.

    Attributes:
      train, validation: the rows of each part; None where none is to be validated on.
      notes: lines for whoever starts the run: sizes, and what was left out.
      tokenizer: of its text.
      meta: what the batches depend on beside the step number, as JSON can hold it; it
        goes into each checkpoint, and `refuse_other_data` compares it on resumption.
      by_length: with `data.lengths`, what is trained on in place of `train`.
    """

    train: Rows
    validation: Rows | None
    notes: list[str]
    tokenizer: Tokenizer
    meta: dict[str, Any]
    by_length: RowsByLength | None = None


def open_data(config: Config) -> RunData:
    """Finds the corpus and lays out its rows; on several processes, on all of them.

    Tokens are those of the tokenizer of `model.from`, where that folder has one, else
    of the prepared folder that it reads, else bytes. Once a run has begun its own
    folder has a copy. Each part of a mixture is opened so, and they must agree.

    Raises:
      ValueError: the vocabulary is too small, the corpus is missing, empty, unreadable
        or too small to part, was prepared with another tokenizer, or is not the same on
        every process.

    Cost: of text as bytes it opens every file once, and reads 8 KiB of it. Of a
    prepared folder it reads and holds 8 bytes a document. Else every process tokenises
    all files, and holds 4 bytes a token.
    """
    open_all = _open_mixture if config.data.mixture else _open
    if jax.process_count() == 1:
        return open_all(config)
    try:
        opened = open_all(config)
    except Exception:
        # The others wait for this process's word, and would wait for ever.
        _check_same_everywhere(None)
        raise
    _check_same_everywhere(opened.meta)
    return opened


def refuse_other_data(
    saved: dict[str, Any], current: dict[str, Any], config: Config | None = None
) -> None:
    """Refuses to go on with other batches than those that a checkpoint was made with.

    Args:
      saved: `RunData.meta` of the checkpoint.
      current: `RunData.meta` now.
      config: of the run, to name a folder that it could start anew in.

    Raises:
      ValueError: names everything that differs, with both values, and the remedy.
    """

    def said(meta: dict[str, Any], name: str) -> Any:
        return meta.get(name, _UNSAID.get(name, "absent"))

    differ = [
        f"{name} was {said(saved, name)}, is {said(current, name)}"
        for name in {**saved, **current}
        if said(saved, name) != said(current, name)
    ]
    if differ:
        folder = "FOLDER"
        if config is not None:
            others = saved.get("fingerprint") != current["fingerprint"]
            folder = shlex.quote(str(_free_folder(config, of_other_files=others)))
        raise ValueError(
            f"the checkpoint was trained on other batches ({'; '.join(differ)}): go "
            "back to the old setting or files, or start anew with another folder, "
            f"--run.folder {folder}"
        )


def _free_folder(config: Config, *, of_other_files: bool) -> Path:
    """One beside the run's, named after the files if they are others than before."""
    assert config.run.folder is not None
    here = Path(config.run.folder)
    name = here.name
    if of_other_files:
        files = config.data.mixture or (config.data.files,)
        name = root_of(files[0]).resolve().stem or name
    numbered = (f"{name}-{number}" for number in itertools.count(2))
    return next(
        path
        for path in (here.parent / each for each in itertools.chain([name], numbered))
        if not path.exists()
    )


def _open(config: Config) -> RunData:
    data, training = config.data, config.training
    path = Path(os.path.expanduser(data.files))
    if is_prepared(path):
        tokens = PreparedTokens(path)
        tokenizer = tokenizer_of_prepared(config, tokens.index, path)
        meta = {"fingerprint": fingerprint_of(path)}
        streams = streams_of_tokens(
            tokens, data.validation_fraction, config.run.seed, meta
        )
        notes = _skipped(tokens.index["skipped"])
        if "date" in tokens.index:
            notes.append(f"its chats have the date {tokens.index['date']}")
    else:
        tokenizer, _ = tokenizer_of_run(config)
        documents, notes = find_documents(data.files, config.run.folder)
        check_vocabulary(config.model.vocab_size, tokenizer)
        if all(kind_of(each.name) == "text" for each in documents):
            streams = streams_of_text(
                documents, tokenizer, data.validation_fraction, config.run.seed
            )
        else:
            held = held_records(documents, tokenizer, data.text_field)
            meta = {
                "number of files": len(documents),
                "fingerprint": fingerprint(documents),
                "data.text_field": data.text_field,
            }
            streams = streams_of_tokens(
                held, data.validation_fraction, config.run.seed, meta
            )
            notes += _skipped(held.num_empty)
            notes.append(
                "every start reads and tokenises all of it, on each process: python -m "
                "ulysses_jax.data prepare does so once"
            )

    def rows(stream: Stream) -> Rows:
        kind = PackedRows if data.packing == "whole" else Rows
        return kind(
            stream, training.sequence_tokens, mask_documents=data.mask_documents
        )

    train = rows(streams.train)
    validation = None if streams.validation is None else rows(streams.validation)
    sizes = _sizes(train, validation, streams.what)
    notes = [f"data.files {data.files!r}: {sizes}", *streams.notes, *notes]
    if isinstance(train, PackedRows):
        notes.append(_packed(train))
    by_length = rows_by_length(streams.train, config) if data.lengths else None
    if by_length is not None:
        notes += by_length.notes
    elif len(train) < training.batch_size:
        notes.append(
            f"the {train.num_tokens:,} training tokens are {len(train):,} rows of "
            f"{training.sequence_tokens:,}, fewer than training.batch_size "
            f"{training.batch_size}: a batch holds rows more than once"
        )
    meta = {
        "run.seed": config.run.seed,
        "training.batch_size": training.batch_size,
        "training.sequence_tokens": training.sequence_tokens,
        "data.mask_documents": data.mask_documents,
        "data.validation_fraction": data.validation_fraction,
        **streams.meta,
    }
    if data.packing != "stream":
        meta["data.packing"] = data.packing
    if by_length is not None:
        meta |= by_length.meta
    if not isinstance(tokenizer, Bytes):
        notes.append(f"tokens: of {tokenizer.path}")
        meta |= {
            "tokenizer": digest_of(tokenizer),
            "tokens that end": list(tokenizer.ends),
        }
    return RunData(train, validation, notes, tokenizer, meta, by_length)


def _open_mixture(config: Config) -> RunData:
    """The parts of `data.mixture` together."""
    data = config.data
    parts = []
    for files in data.mixture:
        alone = dataclasses.replace(data, files=files, mixture=(), weights=())
        parts.append(_open(dataclasses.replace(config, data=alone)))
    digests = [digest_of(part.tokenizer) for part in parts]
    for files, digest in zip(data.mixture, digests, strict=True):
        if digest != digests[0]:
            raise ValueError(
                f"data.mixture has tokens of two tokenizers, {digests[0]} in "
                f"{data.mixture[0]} and {digest} in {files}: prepare all of its parts "
                "with one (python -m ulysses_jax.data prepare)"
            )
    train = MixedRows([part.train for part in parts], data.weights)
    validate = [part.validation for part in parts if part.validation]
    validation = MixedRows(validate, [1.0] * len(validate)) if validate else None
    notes = [note for part in parts for note in part.notes]
    for files, part, weight in zip(data.mixture, parts, data.weights, strict=True):
        share = weight / sum(data.weights)
        epoch = len(part.train) / share / config.training.batch_size
        notes.append(
            f"data.mixture: {share:.1%} of the rows are of {files}: an epoch of it in "
            f"{epoch:,.0f} steps, {config.training.num_steps / epoch:.1f} in the run"
        )
    meta: dict[str, Any] = {"data.weights": list(data.weights)}
    for name in dict.fromkeys(name for part in parts for name in part.meta):
        values = [part.meta.get(name, "absent") for part in parts]
        same = all(value == values[0] for value in values)
        meta[name] = values[0] if same else values
    every = "".join(part.meta["fingerprint"] for part in parts)
    meta["fingerprint"] = hashlib.sha256(every.encode()).hexdigest()
    return RunData(train, validation, notes, parts[0].tokenizer, meta)


def _packed(rows: PackedRows) -> str:
    split = rows.packing.num_split
    return (
        f"data.packing whole: {counted(len(rows), 'row')} of {rows.sequence_tokens:,} "
        f"tokens, {rows.padding:.2%} padding; {counted(split, 'document')} longer than "
        "a row, split"
    )


def _skipped(number: int) -> list[str]:
    if not number:
        return []
    return [f"skipped {counted(number, 'document')} without text"]


def _sizes(train: Rows, validation: Rows | None, what: str) -> str:
    parts = {"train": train} | ({"validation": validation} if validation else {})
    total = sum(rows.num_tokens for rows in parts.values())
    return "; ".join(
        f"{name} {counted(len(rows.stream.ends), what)}, "
        f"{counted(rows.num_tokens, 'token')}"
        + (f" ({rows.num_tokens / total:.1%})" if name == "validation" else "")
        for name, rows in parts.items()
    )


def counted(number: int, what: str) -> str:
    """`1 file`, `2,000 files`."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def _check_same_everywhere(mine: dict[str, Any] | None) -> None:
    """Compares `RunData.meta` of all processes; None: this one has no corpus."""
    said = np.frombuffer(b"" if mine is None else json.dumps(mine).encode(), np.uint8)
    gather = multihost_utils.process_allgather
    lengths = np.asarray(gather(np.int32(len(said)))).tolist()
    padded = np.asarray(gather(np.pad(said, (0, max(*lengths, 1) - len(said)))))
    if mine is None:
        return
    missing = [process for process, length in enumerate(lengths) if not length]
    if missing:
        raise ValueError(
            f"processes {missing} of {len(lengths)} cannot open data.files: their own "
            "output says why"
        )
    metas = [
        json.loads(bytes(line[:length]))
        for line, length in zip(padded, lengths, strict=True)
    ]
    others = [process for process, meta in enumerate(metas) if meta != metas[0]]
    if others:
        here, there = metas[others[0]], metas[0]
        differ = "; ".join(
            f"{name} is {here.get(name, 'absent')}, there {there.get(name, 'absent')}"
            for name in {**here, **there}
            if here.get(name) != there.get(name)
        )
        raise ValueError(
            f"the files of data.files, or the tokenizer, differ between process 0 and "
            f"processes {others} of {len(metas)} ({differ}; a fingerprint is of names "
            "and sizes, or as prepared): give all the same files (the standard library "
            "differs between Python versions)"
        )
