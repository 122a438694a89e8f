"""A config for its model: what the step cannot train, or the model cannot use, is
refused."""

import dataclasses
import inspect
from typing import Any

import jax.numpy as jnp
from flax import nnx

from ulysses_jax.config import Config, Memory
from ulysses_jax.training.model import (
    MakeModel,
    head_of,
    made,
    no_mesh,
    own_name,
    where_of,
)


def prepared(config: Config, make_model: MakeModel) -> Config:
    """The config for this model, before it is placed on a mesh.

    Raises:
      ValueError: a user's module that the step cannot train, or options of the config
        that only act on this library's layers.
    """
    name = own_name(config, make_model)
    check = _check_module if name else _check_parameters
    with no_mesh():
        nnx.eval_shape(lambda: check(made(config, make_model), config.model.vocab_size))
    if name is None:
        if config.model.lora is not None and config.model.from_ is None:
            raise ValueError(
                "model.lora adapts weights that are not trained, and model.from does "
                "not say whose: give a Hugging Face folder (--model.from path/to/it), "
                "or leave model.lora out to train all parameters"
            )
        return config
    if config.model.lora is not None:
        raise ValueError(
            f"model.lora adapts the projections of ulysses_jax.Transformer, and {name} "
            "is none: leave it out, and make adapters in your own module"
        )
    if config.model.from_ is not None:
        raise ValueError(
            f"model.from {config.model.from_} has the weights of a "
            f"ulysses_jax.Transformer, and {name} is none: leave it out, and let "
            "make_model read its own"
        )
    plain = vars(Memory()) | {"loss_tile_tokens": config.memory.loss_tile_tokens}
    for option, value in vars(config.memory).items():
        also = {"remat": "none", "head_chunks": 1}.get(option)
        if value not in (plain[option], also):
            raise ValueError(
                f"memory.{option} {value} acts on the layers of "
                f"ulysses_jax.Transformer, and {name} is none: leave it out, and use "
                "nnx.remat or jax.checkpoint in its features"
            )
    if config.training.optimizer == "muon":
        raise ValueError(
            "training.optimizer muon steps the matrices inside the layers of "
            f"ulysses_jax.Transformer, and {name} is none: which of its parameters are "
            "tables or heads is not known; use adamw, lion, adafactor or sgd"
        )
    if config.training.zero_stage == 2:
        raise ValueError(
            "training.zero_stage 2 cuts the gradients of ulysses_jax.Transformer, and "
            f"{name} is none: use 3, where parameters and gradients lie as its own "
            "parameters say, or 1"
        )
    # Its attention is its own: no groups of heads, tokens in the sequence's order.
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, zigzag=bool(config.model.zigzag)),
        memory=dataclasses.replace(config.memory, head_chunks=1),
    )


def _check_module(model: Any, vocab_size: int) -> None:
    name = type(model).__name__
    for part, what in (
        ("features", "features(tokens, positions, segment_ids) -> [B, T, D]"),
        ("head", "head, float32 [vocab_size, D]"),
    ):
        # A property's own AttributeError is its own to say.
        if part not in {*dir(type(model)), *vars(model)}:
            raise ValueError(f"{name} has no {part}: a model to train has {what}")
    try:
        inspect.signature(model.features).bind("tokens", "positions", "segment_ids")
    except TypeError as error:
        raise ValueError(
            f"{name}.features cannot be called with tokens, positions, segment_ids "
            f"({error}): make it features(self, tokens, positions, segment_ids), where "
            "segment_ids may be None"
        ) from None
    _check_parameters(model)
    shape = head_of(model).shape
    if len(shape) != 2 or shape[0] != vocab_size:
        raise ValueError(
            f"{name}.head has shape {shape}, and model.vocab_size is {vocab_size}: "
            "head is [vocab_size, D], the transpose of a Linear's kernel"
        )


def _check_parameters(model: Any, *_: Any) -> None:
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        where = where_of(model, *path)
        if not isinstance(variable, nnx.Param):
            raise ValueError(
                f"{where} is a {type(variable).__name__}, and the trainer keeps "
                "parameters alone: make the module without it (no dropout, no batch "
                "statistics)"
            )
        if variable.dtype != jnp.float32:
            raise ValueError(
                f"{where} is {variable.dtype}: parameters are float32; give the "
                "products another dtype (in flax.nnx dtype=, and param_dtype float32)"
            )
