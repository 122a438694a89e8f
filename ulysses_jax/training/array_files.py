"""A checkpoint's arrays: Orbax writes and reads, and each process proves a part."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.future import ChainedFuture

from ulysses_jax.training.proof import why_broken, write_part

# A run ends what hangs, by the size of what it saves (`phases.Phases`).
_SAVE_TIMEOUT_SECONDS = 24 * 60 * 60
# Of a file, so that several threads, and processes, prove them at once; and of a chunk,
# which is read as a whole, however little of it a device wants.
_FILE_BYTES = 2**28
_WRITING_BYTES = 96 * 10**9
# Of reads under way, where no array is larger.
_READING_BYTES = 2**26

# Orbax asks for these before and after each save, for a line of its log. TensorStore
# (0.1.86) never frees the keys and values of a dict that it makes of JSON, so that each
# answer would stay: 0.015 MB a save.
_ASKED_BY_ORBAX = "/tensorstore/kvstore/"
_metrics = tensorstore.experimental_collect_matching_metrics


def _other_metrics(metric_prefix: str = "", include_zero_metrics: bool = False) -> list:
    if metric_prefix == _ASKED_BY_ORBAX:
        return []
    return _metrics(metric_prefix, include_zero_metrics)


tensorstore.experimental_collect_matching_metrics = _other_metrics


def writer(before_the_rename: Callable[[], None]) -> ocp.AsyncCheckpointer:
    """Orbax, which writes in the background what `to_write` gives it.

    Args:
      before_the_rename: called on process 0, when all processes have written.
    """
    return ocp.AsyncCheckpointer(
        ocp.PyTreeCheckpointHandler(
            handler_impl=_Proving(
                # Floats hardly compress: 8 % less, for twice the time.
                use_compression=False,
                save_concurrent_bytes=_WRITING_BYTES,
            )
        ),
        async_options=ocp.AsyncOptions(
            timeout_secs=_SAVE_TIMEOUT_SECONDS,
            # Its writers wait that long for a folder that could not be made.
            create_directories_asynchronously=False,
            post_finalization_callback=before_the_rename,
        ),
        atomicity_options=ocp.options.AtomicityOptions(
            mode=ocp.options.AtomicityMode.ATOMIC_RENAME
        ),
    )


def to_write(state: Any) -> ocp.args.PyTreeSave:
    """What `writer` saves; a pytree of jax.Arrays."""
    return ocp.args.PyTreeSave(state, ocdbt_target_data_file_size=_FILE_BYTES)


class _Proving(ocp.BasePyTreeCheckpointHandler):
    """Orbax's handler, whose processes each prove what they wrote."""

    async def async_save(self, directory: Any, args: Any) -> list[Any]:
        written = await super().async_save(directory, args) or []

        def prove() -> None:
            write_part(Path(directory), jax.process_index())

        return [ChainedFuture(written, prove)]


def read_proven(folder: Path, item: Any) -> tuple[Any, str | None]:
    """Reads arrays and proves the files they are in, at the same time.

    Returns:
      The arrays, and None; or None, and why the checkpoint is broken, alike on all
      processes.

    Raises:
      OSError, MemoryError, JaxRuntimeError: the machine's, in the process that met it.
      ValueError: the files are as they were written, but by nobody's run; or another
        process cannot read them.
    """
    me, count = jax.process_index(), jax.process_count()
    largest = max(x.size * x.dtype.itemsize for x in jax.tree.leaves(item))
    handler = ocp.PyTreeCheckpointHandler(
        handler_impl=ocp.BasePyTreeCheckpointHandler(
            restore_concurrent_bytes=max(largest + 1, _READING_BYTES)
        )
    )
    args = ocp.args.PyTreeRestore(
        item=item,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
        partial_restore=True,
    )
    arrays, failure = None, None
    with ThreadPoolExecutor(1) as beside:
        proof = beside.submit(why_broken, folder, part=me, parts=count)
        try:
            # Not by way of Orbax's Checkpointer, in which a process whose files are
            # broken would leave the others at a barrier.
            arrays = jax.block_until_ready(
                handler.restore(epath.Path(folder), args=args)
            )
        except Exception as error:
            failure = error
        why = proof.result()
    told = _of_all(f"b{why}" if why else f"f{failure}" if failure else "")
    if broken := [words[1:] for words in told if words.startswith("b")]:
        return None, broken[0]
    if failure is not None:
        _raise_in_words(failure, folder)
    for process, words in enumerate(told):
        if words:
            raise ValueError(f"process {process} cannot read {folder}: {words[1:]}")
    return arrays, None


def _raise_in_words(error: Exception, folder: Path) -> NoReturn:
    if isinstance(error, (jax.errors.JaxRuntimeError, MemoryError, OSError)):
        raise error
    why = (str(error).strip() or repr(error)).splitlines()[0]
    raise ValueError(
        f"{folder} is no checkpoint of a run, although its checksums are right: "
        f"{why}; remove it, or use another run.folder (--run.folder)"
    ) from error


def _of_all(words: str, most: int = 300) -> list[str]:
    """What each process says, on each."""
    if jax.process_count() == 1:
        return [words]
    row = np.zeros(most, np.uint8)
    given = np.frombuffer(words.encode()[:most], np.uint8)
    row[: len(given)] = given
    rows = np.asarray(multihost_utils.process_allgather(row))
    return [bytes(x).rstrip(b"\0").decode(errors="replace") for x in rows]
