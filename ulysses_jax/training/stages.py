"""A run in stages: one run after another, each from the last parameters of the one
before."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax

from ulysses_jax.config import Config
from ulysses_jax.mesh import allow_promotion
from ulysses_jax.models.transformer import Transformer
from ulysses_jax.training.checkpoint import Checkpointer
from ulysses_jax.training.load import refuse_other_adapters
from ulysses_jax.training.model import MakeModel
from ulysses_jax.training.output import print_every_name
from ulysses_jax.training.run import on_mesh, run_once


@allow_promotion()
@print_every_name()
def train_stages(
    configs: Sequence[Config],
    make_model: MakeModel = Transformer,
    *,
    interrupted: Callable[[], Any] | None = None,
) -> Any:
    """Trains the stages of `config_file.load_stages`; one config is `training.train`.

    Called again it goes on where it stopped, in a stage or between two. Each stage has
    its own folder, optimizer state and learning rate's schedule.

    Returns:
      The module that the last stage trained.

    Raises:
      ValueError: a stage that the mesh cannot hold, or that trains others than the
        one before, by its number, before the first one starts; more steps for a stage
        after which another has begun; else as `training.train`.
    """
    many = len(configs) > 1
    for number, config in enumerate(configs, 1):
        try:
            on_mesh(config, make_model)
            if number > 1:
                lora = configs[number - 2].model.lora
                same = "give every stage the same model.lora, or none"
                refuse_other_adapters(lora, config, same)
        except ValueError as error:
            if not many:
                raise
            raise ValueError(f"stage {number} of {len(configs)}: {error}") from None
    _refuse_more_steps(configs)
    model = None
    for number, config in enumerate(configs, 1):
        is_last = number == len(configs)
        if many and jax.process_index() == 0:
            print(f"stage {number} of {len(configs)}: {config.run.folder}", flush=True)
        if is_last or _steps_taken(config) < config.training.num_steps:
            model = None  # its memory is the next one's
            model = run_once(config, make_model, interrupted, is_last=is_last)
    return model


def _refuse_more_steps(configs: Sequence[Config]) -> None:
    """A stage is done when the next has begun: that one would not start from what more
    steps make."""
    for number, (config, after) in enumerate(pairwise(configs), 1):
        taken, asked = _steps_taken(config), config.training.num_steps
        if taken < asked and _steps_taken(after):
            raise ValueError(
                f"stage {number} of {len(configs)} has training.num_steps {asked}, and "
                f"stage {number + 1} has begun from its step {taken}: set it to "
                f"{taken} in the file, or give all stages another run.folder "
                "(--run.folder)"
            )


def _steps_taken(config: Config) -> int:
    """Those that are saved."""
    assert config.run.folder is not None
    folder = Path(config.run.folder) / "checkpoints"
    with Checkpointer(folder, interval_steps=1) as checkpoints:
        saved = checkpoints.latest_meta()
    return 0 if saved is None else saved[0]
