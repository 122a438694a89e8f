"""Checkpoints that are either whole or not offered: saved aside, proven when read."""

import errno
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from ulysses_jax.training import array_files
from ulysses_jax.training.arrays import aside, describe, on_devices, refuse_others
from ulysses_jax.training.preflight import gb
from ulysses_jax.training.proof import read_commit, why_unfit, write_commit

_NONE, _ALL_BROKEN = -1, -2
_WAITED_SECONDS = 1.0  # less is not worth a word


class Checkpointer:
    """Saves and restores a run's state in `folder`, one sub-folder a step.

    Every process of the run makes one and calls the same methods in the same order; the
    folder is one they all see. Costs: `save` returns when the state is copied to host
    memory, also what lies there already, until it is written, uncompressed; in the
    background each process reads what it wrote once more, for the checksums. While a
    state is restored its files are read a second time, a part by each process.

    Args:
      folder: of the checkpoints alone; made when missing.
      interval_steps: how often `due` says yes.
      keep: how many checkpoints stay; one more exists while the next is written.
    """

    def __init__(self, folder: Path, *, interval_steps: int, keep: int = 3):
        if interval_steps < 1 or keep < 1:
            raise ValueError(
                f"interval_steps {interval_steps} and keep {keep} must be positive"
            )
        # Orbax logs a traceback for errors that are raised here as well.
        logging.getLogger("absl").addFilter(_not_from_orbax)
        self.folder = folder.absolute()
        self.interval_steps = interval_steps
        self.keep = keep
        self.newest: int | None = None  # whole: saved or restored by this object
        self._restored = False
        self._has_failed = False
        self._saving: tuple[int, dict[str, Any]] | None = None
        self._begun = -math.inf
        self._written = 0.0, 0  # seconds that the last one took, and its bytes
        self._committed: dict[int, tuple[float, int]] = {}
        self._has_said = False
        self._beside = ThreadPoolExecutor(1)
        self._removing: Future[None] | None = None
        self._orbax = array_files.writer(self._write_commit)

    def due(self, step: int) -> bool:
        """Whether to save at this step; raises what a save in the background met."""
        try:
            self._orbax.check_for_errors()
        except Exception as error:
            self._fail(error)
        self._look()
        return step % self.interval_steps == 0

    def take_committed(self) -> dict[int, tuple[float, int]]:
        """On process 0, by step: of the saves that were whole on disk when `due`,
        `save` or `wait` last looked, the seconds that each took, and its bytes; once.
        """
        taken, self._committed = self._committed, {}
        return taken

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> str | None:
        """Starts to save, and returns while the files are written.

        The state may be donated or changed right after. A step that this object saved
        or restored last is not saved twice.

        Args:
          step: the number of steps taken, more than in any checkpoint before.
          state: a pytree of jax.Arrays, sharded in any way over any processes.
          meta: values that JSON can hold.

        Returns:
          Once, where it waited for the save before: a sentence that says for how long,
          and what to set.

        Raises:
          OSError: this save or the one before could not be written; no step of it is
            ever offered, and the checkpoints before it are as they were.
          ValueError: the folder holds checkpoints and none was asked for.
        """
        asked = time.monotonic()
        before = None if self._saving is None else self._saving[0]
        self.wait()
        if step == self.newest:
            return None
        said = None
        if before is not None:
            said = self._waited(asked, step - before, step % self.interval_steps == 0)
        body = {
            "step": step,
            "meta": json.loads(json.dumps(meta)),  # as it is now, and as it will read
            "arrays": describe(state),
        }
        self._make_room(step)
        self._saving, self._begun = (step, body), time.monotonic()
        try:
            args = array_files.to_write(jax.tree.map(aside, state))
            self._orbax.save(self.folder / str(step), args=args)
        except Exception as error:
            self._fail(error)
        return said

    def restore(
        self, abstract_state: Any, *, on_skipped: Callable[[str], Any] = print
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """Reads the newest whole checkpoint, or None when there is none at all.

        Process 0 looks at commit files, sizes and small files, newest first, and all
        take its choice. The checksums of large files are proven while arrays are read
        from them; where one is wrong, those are thrown away and older ones are read.

        Args:
          abstract_state: the pytree that was saved, of `jax.ShapeDtypeStruct` with the
            shardings wanted now: any mesh, not only the one that saved. Shardings
            without devices, as `jax.eval_shape` leaves them, are taken on the mesh set
            with `jax.set_mesh`, and none at all as replicated there.
          on_skipped: called on process 0 with a sentence for each checkpoint passed
            over: which, why, and which is used instead.

        Returns:
          The step, the state with the shardings of `abstract_state`, and the meta.

        Raises:
          ValueError: there are checkpoints and none is whole; or the arrays saved are
            not those of `abstract_state`.
        """
        item = jax.tree.map(on_devices, abstract_state)
        found = self._read_newest(describe(abstract_state), "", item, on_skipped)
        self._restored = True
        if found is not None:
            self.newest = found[0]
        return found

    def restore_part(self, name: str, abstract: Any) -> Any:
        """Reads one field of the newest whole checkpoint's state, and no other.

        Args:
          name: of the field, such as "parameters".
          abstract: as `restore`'s, of that field; each with a sharding.

        Raises:
          ValueError: there is no whole checkpoint, or it holds other arrays there.
        """
        prefix = f".{name}"
        wanted = {f"{prefix}{path}": of for path, of in describe(abstract).items()}
        found = self._read_newest(wanted, prefix, {name: abstract}, print)
        if found is None:
            raise ValueError(f"there is no checkpoint in {self.folder}")
        return found[1][name]

    def latest_meta(self) -> tuple[int, dict[str, Any]] | None:
        """The newest step committed and its meta, or None; needs no device.

        Only the commit file is proven here: `restore` may find array data broken and
        take an older checkpoint, so take data positions from what `restore` returns.
        """
        for step in reversed(self._steps()):
            try:
                return step, read_commit(self.folder / str(step))["meta"]
            except ValueError:
                continue  # `restore` says which, and why
        return None

    def wait(self) -> None:
        """Returns when the save under way is committed.

        Raises:
          OSError: it could not be written.
        """
        try:
            self._orbax.wait_until_finished()
        except Exception as error:
            self._fail(error)
        if self._saving is not None:
            self._look()
            self.newest, self._saving = self._saving[0], None
        if self._removing is not None:
            self._removing.result()
            self._removing = None

    def close(self) -> None:
        """Waits for the save under way, then lets go of the threads."""
        try:
            self.wait()
        finally:
            self._orbax.close()
            self._beside.shutdown()
            if self._has_failed:
                self._remove_unfinished()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self.close()
        except OSError as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # the first error is the one to read

    def _steps(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        # Passed over is whatever else lies here: a file "9", folders "0004", "\u00b2".
        return sorted(
            int(path.name)
            for path in self.folder.iterdir()
            if path.name.isdecimal()
            and str(int(path.name)) == path.name
            and path.is_dir()
        )

    def _unfinished(self) -> Iterator[Path]:
        """Folders that Orbax writes into before the rename: <step>.orbax-..."""
        return self.folder.glob("[0-9]*.orbax-checkpoint-tmp*")

    def _remove_unfinished(self) -> None:
        if jax.process_index() == 0:
            for path in self._unfinished():
                shutil.rmtree(path, ignore_errors=True)

    def _read_newest(
        self,
        wanted: dict[str, Any],
        prefix: str,
        item: Any,
        on_skipped: Callable[[str], Any],
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest whole checkpoint's step, arrays and meta; None: there is none.

        Args:
          wanted: as `describe` gives it, of those arrays whose paths begin with prefix.
          item: the same, as a pytree with shardings.
        """
        steps, broken = self._steps() if jax.process_index() == 0 else [], []

        def say(used: str) -> None:
            if jax.process_index() == 0:
                for sentence in broken:
                    on_skipped(f"{sentence}; {used} instead; the next save removes it")
                for path in self._unfinished():
                    on_skipped(
                        f"{path} was never finished: the run stopped while it was "
                        f"being written; {used}; the next save removes it"
                    )

        while (step := self._next(steps, broken)) >= 0:
            folder = self.folder / str(step)
            commit = read_commit(folder)
            saved = commit["arrays"]
            saved = {path: of for path, of in saved.items() if path.startswith(prefix)}
            refuse_others(saved, wanted, folder)
            arrays, why = array_files.read_proven(folder, item)
            if why is None:
                say(f"using step {step}")
                return step, arrays, commit["meta"]
            broken.append(f"the checkpoint of step {step} is broken: {why}")
        if step == _ALL_BROKEN:
            listed = "; ".join(broken) or "process 0 says which and why"
            raise ValueError(
                f"no checkpoint in {self.folder} is whole: {listed}. Put a copy of one "
                "back; or, to start from step 0, remove that folder or use another "
                "run.folder (--run.folder)"
            )
        say("nothing to resume")
        return None

    def _next(self, steps: list[int], broken: list[str]) -> int:
        """Takes the last of process 0's steps that may be read; negative: none."""
        chosen = _ALL_BROKEN if broken else _NONE
        while steps and chosen < 0:
            step = steps.pop()
            if (why := why_unfit(self.folder / str(step))) is None:
                chosen = step
            else:
                broken.append(f"the checkpoint of step {step} is broken: {why}")
                chosen = _ALL_BROKEN
        if jax.process_count() > 1:
            chosen = int(multihost_utils.broadcast_one_to_all(np.int32(chosen)))
        return chosen

    def _look(self) -> None:
        """Whether the save under way is committed; then older ones are removed, in a
        thread: it takes its time too."""
        if self._saving is None or self._removing or jax.process_index() > 0:
            return
        step = self._saving[0]
        if (self.folder / str(step)).is_dir():
            self._committed[step] = self._written
            self._removing = self._beside.submit(self._remove_surplus)

    def _remove_surplus(self) -> None:
        for step in self._steps()[: -self.keep]:
            shutil.rmtree(self.folder / str(step))

    def _waited(self, asked: float, steps: int, by_steps: bool) -> str | None:
        """What there is to say of the wait that has just ended, since `asked`."""
        waited, due = time.monotonic() - asked, asked - self._begun
        if self._has_said or waited < _WAITED_SECONDS:
            return None
        self._has_said = True
        took = waited + due
        remedy = (
            f"raise training.checkpoint_interval_steps ({self.interval_steps}) to "
            f"{math.ceil(steps * took / due)} or more"
            if by_steps
            else "raise training.checkpoint_interval_minutes"
        )
        return (
            f"training stood still for {waited:.1f} s: a checkpoint takes {took:.1f} s "
            f"to write, and the next one was due after {due:.1f} s; {remedy}"
        )

    def _make_room(self, step: int) -> None:
        """Removes what an interrupted run left behind and `restore` passed over."""
        newest = -1 if self.newest is None else self.newest
        ahead = [s for s in self._steps() if s > newest]
        if ahead and not self._restored:
            raise ValueError(
                f"{self.folder} holds checkpoints of steps {ahead} of another run: "
                "restore from it, or use another run.folder (--run.folder)"
            )
        if step < newest:
            raise ValueError(f"step {step} comes before the one saved last, {newest}")
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in [*self._unfinished(), *(self.folder / str(s) for s in ahead)]:
                shutil.rmtree(path)

    def _write_commit(self) -> None:
        """Runs on process 0 when all have written, before the rename that commits."""
        assert self._saving is not None
        step, body = self._saving
        # Not by a pattern with the step: Python keeps thousands of patterns.
        (folder,) = (x for x in self._unfinished() if x.name.split(".")[0] == str(step))
        size = write_commit(folder, body)
        self._written = time.monotonic() - self._begun, size

    def _fail(self, error: Exception) -> NoReturn:
        assert self._saving is not None
        step, arrays = self._saving[0], self._saving[1]["arrays"]
        self._saving, self._has_failed = None, True
        # It holds the disk's last bytes. What a late writer adds goes with `close`.
        self._remove_unfinished()
        why = str(error).strip().splitlines()[0] if str(error) else repr(error)
        full = os.strerror(errno.ENOSPC)
        if full in str(error):
            free = shutil.disk_usage(self.folder).free
            size = sum(math.prod(s) * np.dtype(d).itemsize for d, s in arrays.values())
            why = f"{full}: {gb(free)} free, a checkpoint takes {gb(size)}"
        before = (
            "there is no checkpoint before it"
            if self.newest is None
            else f"the one of step {self.newest} is whole: the same command resumes it"
        )
        raise OSError(
            f"the checkpoint of step {step} could not be written to {self.folder}: "
            f"{why}; {before}"
        ) from error


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname
