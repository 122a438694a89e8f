"""What a run made, for Python: its model, from the folder that it left."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import get_abstract_mesh

from ulysses_jax.config import Config, Lora
from ulysses_jax.config_file import load
from ulysses_jax.lora import adapted
from ulysses_jax.models.adapter import joined, part_like, split
from ulysses_jax.models.transformer import Transformer
from ulysses_jax.run_folder import check_run_folder, stages_in
from ulysses_jax.tensors.reading import described, read_parameters
from ulysses_jax.training.base import fingerprint, open_base, refuse_other_base
from ulysses_jax.training.checkpoint import Checkpointer
from ulysses_jax.training.meta import saved_lora, saved_meta
from ulysses_jax.training.model import (
    MakeModel,
    abstract_model,
    for_calls,
    identity,
    model_of,
)
from ulysses_jax.training.preflight import differences, refuse_other_model
from ulysses_jax.weights.parameter import sharding_of


@dataclass(frozen=True)
class Before:
    """A run that is there, whose parameters another one starts from."""

    checkpoints: Path

    def read(self, abstract: dict[str, Any]) -> dict[str, Any]:
        """Those of its newest whole checkpoint, where `abstract` says.

        Raises:
          ValueError: none is whole, or they are other arrays.
        """
        with Checkpointer(self.checkpoints, interval_steps=1) as checkpoints:
            return checkpoints.restore_part("parameters", abstract)


def open_run(config: Config, meta: dict[str, Any]) -> tuple[Before, list[str]]:
    """The run of `run.after`, and lines on what of the model is other than there.

    Args:
      config: of the run that starts.
      meta: what its own checkpoints will have.

    Raises:
      ValueError: no run is there, or it has saved no step; it trained another class,
        or other adapters than this one, or those of other weights.
    """
    folder = config.run.after
    assert folder is not None
    before = Before(Path(folder) / "checkpoints")
    with Checkpointer(before.checkpoints, interval_steps=1) as checkpoints:
        saved = saved_meta(checkpoints)
    if saved is None:
        stages = stages_in(Path(folder))
        raise ValueError(
            f"run.after {folder} has no checkpoint to start from: "
            + (
                f"give a stage of it, {stages[-1]}"
                if stages
                else "train it first, or give another run's folder"
            )
        )
    step, then = saved
    changed = differences(then["model"], meta["model"])
    was = saved_lora(then)
    refuse_other_adapters(was, config)
    if was is not None:
        refuse_other_base(then["base"], meta["base"], config)
    return before, [f"starting after step {step} of {folder}", *changed]


def refuse_other_adapters(
    was: Lora | None, config: Config, remedy: str | None = None
) -> None:
    """Refuses to go on from a run that trained other parameters than this one.

    Args:
      was: `model.lora` of the run that `config.run.after` names.
      remedy: another one than to merge that run's adapters.

    Raises:
      ValueError: one trains adapters and the other does not, or they are of another
        rank or of other projections.
    """

    def what(lora: Lora | None) -> str:
        if lora is None:
            return "all parameters"
        names = adapted(dataclasses.replace(config.model, lora=lora))
        return f"adapters of rank {lora.rank} on {', '.join(names)}"

    folder, now = config.run.after, config.model.lora
    if what(was) != what(now):
        remedy = remedy or (
            "set model.lora as there, or write that run as a folder (python -m "
            f"ulysses_jax.export --run {folder} --to merged), and start from that "
            "(--model.from merged --run.after null)"
        )
        raise ValueError(
            f"run.after {folder} trained {what(was)}, and this run, by model.lora, "
            f"trains {what(now)}: {remedy}"
        )


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
    check_run_folder(folder)
    config = for_calls(load(folder / "config.yaml"))

    def described_shape(variable: Any) -> jax.ShapeDtypeStruct:
        sharding = sharding_of(variable)
        return jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=sharding)

    state = nnx.state(abstract_model(config, make_model))
    target = nnx.to_pure_dict(state, extract_fn=described_shape)
    target, frozen = split(config.model, target)
    checkpoints = Checkpointer(folder / "checkpoints", interval_steps=1)
    with checkpoints:
        saved = saved_meta(checkpoints)
        if saved is not None:
            refuse_other_model(saved[1]["model"], identity(config, make_model))
        source = None
        if frozen:
            source = open_base(config)
            if saved is not None:
                refuse_other_base(saved[1]["base"], fingerprint(source[0]), config)
        parameters = checkpoints.restore_part("parameters", target)
    if get_abstract_mesh().empty:
        # Orbax binds them to the device, and no mesh that is set later may take them.
        parameters = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), parameters)
    if source is not None:
        lie = part_like(described(abstract_model(config, make_model)), frozen)
        parameters = joined(parameters, read_parameters(*source, lie))
    return model_of(config, parameters, make_model)
