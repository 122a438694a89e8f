"""What a run made, for Python: its model, from the folder that it left."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import get_abstract_mesh

from ulysses_jax.config_file import load
from ulysses_jax.models.transformer import Transformer
from ulysses_jax.run_folder import is_run_folder
from ulysses_jax.training.checkpoint import Checkpointer
from ulysses_jax.training.model import (
    MakeModel,
    abstract_model,
    for_calls,
    identity,
    model_of,
)
from ulysses_jax.training.preflight import refuse_other_model
from ulysses_jax.weights.parameter import sharding_of


def load_run(folder: str | Path, make_model: MakeModel = Transformer) -> Any:
    """The model of a run's newest whole checkpoint: `load_run("runs/tiny")`.

    Args:
      folder: of a run, with its config.yaml and checkpoints.
      make_model: what the run trained.

    Returns:
      The module, on the mesh that is set with `jax.set_mesh`, whatever the run's was,
      or on one device, from which any mesh may take it that is set later. Its strategy
      and attention are auto, and tokens lie in the sequence's order.

    Raises:
      ValueError: no run is there, no checkpoint of it is whole, or its arrays are not
        those of `make_model`.

    Cost: process 0 reads every file once, for the checksums; then each process reads
    its shards of the parameters.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        run = next(filter(is_run_folder, folder.parents), None)
        remedy = f": give the run's folder, {str(run)!r}" if run else ""
        raise ValueError(f"{folder} is no run's folder: it has no config.yaml{remedy}")
    config = for_calls(load(folder / "config.yaml"))

    def described(variable: Any) -> jax.ShapeDtypeStruct:
        sharding = sharding_of(variable)
        return jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=sharding)

    state = nnx.state(abstract_model(config, make_model))
    target = nnx.to_pure_dict(state, extract_fn=described)
    checkpoints = Checkpointer(folder / "checkpoints", interval_steps=1)
    with checkpoints:
        saved = checkpoints.latest_meta()
        if saved is not None:
            refuse_other_model(saved[1]["model"], identity(config, make_model))
        parameters = checkpoints.restore_part("parameters", target)
    if get_abstract_mesh().empty:
        # Orbax binds them to the device, and no mesh that is set later may take them.
        parameters = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), parameters)
    return model_of(config, parameters, make_model)
