"""A run's data by its config, and what a resumed run must find again."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ulysses_jax.config import Config
from ulysses_jax.data.corpus import find_documents, fingerprint, shuffled, split
from ulysses_jax.data.rows import Rows
from ulysses_jax.data.tokenizer import check_vocabulary


@dataclasses.dataclass(frozen=True)
class RunData:
    """What a run reads.

    Attributes:
      train, validation: the rows of each part; None where none is to be validated on.
      notes: lines for whoever starts the run: sizes, and what was left out.
      meta: what the batches depend on beside the step number, as JSON can hold it; it
        goes into each checkpoint, and `refuse_other_data` compares it on resumption.
    """

    train: Rows
    validation: Rows | None
    notes: list[str]
    meta: dict[str, Any]


def open_data(config: Config) -> RunData:
    """Finds the corpus and lays out its rows; on several processes, on all of them.

    Raises:
      ValueError: the vocabulary is too small, the corpus is missing, empty, unreadable
        or too small to part, or is not the same on every process.

    Cost: opens every file once, and reads 8 KiB of it.
    """
    if jax.process_count() == 1:
        return _open(config)
    try:
        opened = _open(config)
    except ValueError:
        # The others wait for this process's word, and would wait for ever.
        _check_same_everywhere(None)
        raise
    _check_same_everywhere(opened.meta["fingerprint"])
    return opened


def refuse_other_data(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuses to go on with other batches than those that a checkpoint was made with.

    Args:
      saved: `RunData.meta` of the checkpoint.
      current: `RunData.meta` now.

    Raises:
      ValueError: names everything that differs, with both values.
    """
    differ = [
        f"{name} was {saved.get(name, 'absent')}, is {current.get(name, 'absent')}"
        for name in {**saved, **current}
        if saved.get(name, "absent") != current.get(name, "absent")
    ]
    if differ:
        raise ValueError(
            f"the checkpoint was trained on other batches ({'; '.join(differ)}): go "
            "back to the old setting or files, or start anew in another --run.folder"
        )


def _open(config: Config) -> RunData:
    check_vocabulary(config.model.vocab_size)
    data, training = config.data, config.training
    documents, notes = find_documents(data.files)
    train_documents, validation_documents = split(documents, data.validation_fraction)

    def rows(documents):
        return Rows(
            documents, training.sequence_tokens, mask_documents=data.mask_documents
        )

    train = rows(shuffled(train_documents, config.run.seed))
    validation = rows(validation_documents) if validation_documents else None
    notes.insert(0, f"data.files {data.files!r}: {_sizes(train, validation)}")
    if len(train) < training.batch_size:
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
        "number of files": len(documents),
        "bytes": sum(document.size for document in documents),
        "fingerprint": fingerprint(documents),
    }
    return RunData(train, validation, notes, meta)


def _sizes(train: Rows, validation: Rows | None) -> str:
    return "; ".join(
        f"{name} {len(rows.documents):,} files, {rows.num_tokens:,} tokens"
        for name, rows in (("train", train), ("validation", validation))
        if rows is not None
    )


def _check_same_everywhere(mine: str | None) -> None:
    """Compares the fingerprints of all processes; None: this one has no corpus."""
    digest = np.frombuffer(bytes.fromhex(mine or 32 * "0"), np.uint8)
    digests = np.asarray(multihost_utils.process_allgather(digest))
    if mine is None:
        return
    missing = np.flatnonzero((digests == 0).all(axis=1)).tolist()
    if missing:
        raise ValueError(
            f"processes {missing} of {len(digests)} cannot open data.files: their own "
            "output says why"
        )
    other = np.flatnonzero((digests != digests[0]).any(axis=1)).tolist()
    if other:
        raise ValueError(
            f"the files of data.files differ between process 0 and processes {other} "
            f"of {len(digests)}, in names or sizes: give all the same files (the "
            "standard library differs between Python versions)"
        )
