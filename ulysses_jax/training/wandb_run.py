"""A run's rows for Weights & Biases too, by its own package where that is there."""

import importlib
import importlib.util
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ulysses_jax.config import Config


class WandbRun:
    """The run of Weights & Biases that a run of ours is; a context manager.

    Without `run.wandb`, and in other processes than 0, it does nothing. A run that is
    resumed is the same one there: its id is in the run's folder, in `wandb_id`. Steps
    that are taken again are logged again, over the axis `step`.

    Where it logs, and whether it sends anything, is said to the package as anywhere
    else: `wandb login`, and `WANDB_PROJECT`, `WANDB_MODE` and the like.
    """

    def __init__(self, config: Config, *, is_main: bool):
        self._config = config if config.run.wandb and is_main else None
        self._run: Any = None

    def check(self) -> None:
        """Raises ValueError where the package is needed and missing."""
        if self._config is not None and importlib.util.find_spec("wandb") is None:
            raise ValueError(
                "run.wandb is true, and the package wandb is not installed: pip "
                "install wandb, or leave run.wandb false"
            )

    def start(self) -> None:
        """Begins the run there, or goes on with it.

        Raises:
          ValueError: the package refuses, as where nobody is logged in.
        """
        if self._config is None:
            return
        assert self._config.run.folder is not None
        folder = Path(self._config.run.folder)
        wandb = importlib.import_module("wandb")
        path = folder / "wandb_id"
        if not path.is_file():
            path.write_text(f"{secrets.token_hex(8)}\n")
        try:
            self._run = wandb.init(
                id=path.read_text().strip(),
                resume="allow",
                name=str(folder),
                dir=str(folder),
                config=self._config.to_dict(),
                settings=wandb.Settings(console="off"),  # the output is the run's own
            )
            self._run.define_metric("*", step_metric="step")
        except Exception as error:
            raise ValueError(
                f"run.wandb is true, and wandb.init says: {error}; log in (wandb "
                "login), set WANDB_MODE=offline, or leave run.wandb false"
            ) from error

    def add(self, row: Mapping[str, float]) -> None:
        """Logs numbers of a step, `step` among them. That it fails ends no run."""
        if self._run is None:
            return
        try:
            self._run.log(dict(row))
        except Exception as error:
            self._run = None
            print(
                f"wandb: {error}; the run goes on without it, and its folder has the "
                "numbers",
                file=sys.stderr,
                flush=True,
            )

    def __enter__(self) -> "WandbRun":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._run is not None:
            ended_well = error is None or isinstance(error, KeyboardInterrupt)
            self._run.finish(exit_code=0 if ended_well else 1)
