"""A config filled in, and checked by itself: no mesh is known yet."""

import dataclasses
import math
import os
from typing import Any, get_type_hints

from ulysses_jax.config import (
    MOST_HEADS,
    MOST_LAYERS,
    Config,
    Data,
    Memory,
    Model,
    Training,
    in_pieces,
)
from ulysses_jax.config.model import RECURRENT
from ulysses_jax.fields import checked
from ulysses_jax.lengths import check_lengths
from ulysses_jax.lora import check_lora
from ulysses_jax.rotary import check_rope


def complete(config: Config, *, name: str) -> Config:
    """Fills in the fields that follow from others, and checks each on its own.

    Args:
      name: of the run, where run.folder does not say.

    Raises:
      ValueError: a value of another type or out of its range, by the field's name; or
        fields that exclude each other, with the numbers and what would do.
    """
    if not isinstance(config, Config):
        reads = (
            "config_file.load(path) reads a file"
            if isinstance(config, str | os.PathLike)
            else "config_file.from_dict(Config, values) makes one of nested dicts"
        )
        raise ValueError(
            f"a run takes a ulysses_jax.config.Config, not {_short(config)}: "
            f"ulysses_jax.{reads}"
        )
    for section, cls in get_type_hints(Config).items():
        if dataclasses.is_dataclass(cls):
            _check_class(getattr(config, section), cls, f"Config.{section}")
    config = dataclasses.replace(
        config,
        **{
            section: checked(getattr(config, section), section)
            for section, cls in get_type_hints(Config).items()
            if dataclasses.is_dataclass(cls) and cls is not Model
        },
    )
    model, training = config.model, config.training
    if model.positions == "learned" and model.max_positions is None:
        model = dataclasses.replace(model, max_positions=training.sequence_tokens)
    model = complete_model(model)
    if model.max_positions and model.max_positions < training.sequence_tokens:
        raise ValueError(
            f"model.max_positions {model.max_positions} is less than "
            f"training.sequence_tokens {training.sequence_tokens}: raise it"
        )
    _check_mixture(config.data)
    _check_profile(config.profile, training.num_steps)
    check_lengths(config.data, training)
    if config.data.balance and not config.data.mask_documents:
        raise ValueError(
            "data.balance deals rows by their documents, and data.mask_documents is "
            "false, so that all rows are the same work: leave one of them out"
        )
    _check_memory(config.memory, model, training)
    run = dataclasses.replace(config.run, folder=_folder(config.run.folder, name))
    return dataclasses.replace(config, model=model, run=run)


def _check_profile(steps: tuple[int, ...], num_steps: int) -> None:
    if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1] <= num_steps):
        raise ValueError(
            f"profile {' '.join(map(str, steps))} must be a first and a last step, of "
            f"1 to training.num_steps {num_steps}, such as --profile 10 12"
        )


def _check_mixture(data: Data) -> None:
    if len(data.mixture) != len(data.weights):
        raise ValueError(
            f"data.mixture has {len(data.mixture)} parts and data.weights "
            f"{len(data.weights)} numbers: give one for each part"
        )
    if data.mixture and data.files != Data().files:
        raise ValueError(
            f"data.files {data.files!r} and data.mixture are both given: make the "
            "files a part of the mixture"
        )
    if not all(0 < weight < math.inf for weight in data.weights):
        raise ValueError(
            f"data.weights are {', '.join(map(str, data.weights))}: give positive "
            "numbers, and leave out a part that is not to be read"
        )


def complete_model(model: Model) -> Model:
    """Fills in what follows from a model's other fields, and checks it by itself.

    A completed model stays as it is.

    Raises:
      ValueError: as `complete`; learned positions without model.max_positions, which a
        run takes from training.sequence_tokens.
    """
    _check_class(model, Model, "a model's size")
    model = checked(model, "model")
    for name, most in (
        ("num_layers", MOST_LAYERS),
        ("num_heads", MOST_HEADS),
        ("delta_heads", MOST_HEADS),
    ):
        if (getattr(model, name) or 0) > most:
            raise ValueError(
                f"model.{name} {getattr(model, name)} is more than {most}: use {most} "
                "or fewer"
            )
    if model.head_size is None and model.width % model.num_heads:
        raise ValueError(
            f"model.width {model.width} does not divide by model.num_heads "
            f"{model.num_heads}: change one, or set model.head_size"
        )
    learned = model.positions == "learned"
    if learned and model.max_positions is None:
        raise ValueError(
            "model.positions learned is a table of model.max_positions rows: set "
            "model.max_positions to the longest sequence's tokens, or use "
            "model.positions rope"
        )
    biases = "all" if model.biases else "none"
    kv_heads = model.num_kv_heads or model.num_heads
    size = model.head_size or model.width // model.num_heads
    model = dataclasses.replace(
        model,
        attention_biases=model.attention_biases or biases,
        num_kv_heads=kv_heads,
        head_size=size,
        feed_forward_width=model.feed_forward_width or 4 * model.width,
        max_positions=model.max_positions if learned else None,
        pattern=_default_pattern(model) if model.pattern is None else model.pattern,
    )
    _check_pattern(model)
    if "delta" in model.kinds():
        model = dataclasses.replace(
            model,
            delta_heads=model.delta_heads or model.num_heads,
            delta_key_heads=model.delta_key_heads or kv_heads,
            delta_key_size=model.delta_key_size or size,
            delta_value_size=model.delta_value_size or size,
        )
    _check_divides(model, "num_kv_heads", "num_heads")
    if not learned:
        check_rope(model.rope, size)
    if model.is_recurrent:
        _check_recurrent(model)
    check_lora(model)
    return model


def _check_divides(model: Model, name: str, of: str) -> None:
    size, whole = getattr(model, name), getattr(model, of)
    if whole % size:
        fits = [n for n in range(1, whole + 1) if whole % n == 0]
        raise ValueError(
            f"model.{name} {size} does not divide model.{of} {whole}: use one of {fits}"
        )


def _check_recurrent(model: Model) -> None:
    """Refuses what layers whose tokens reach others by a state cannot have."""
    if "delta" in model.kinds():
        _check_divides(model, "delta_key_heads", "delta_heads")
    of = f"model.pattern {', '.join(model.pattern or ())} has layers of a state, "
    if model.zigzag:
        raise ValueError(
            of + "which take tokens in the sequence's order, and model.zigzag true is "
            "another: leave model.zigzag out"
        )
    if model.strategy == "megatron":
        raise ValueError(
            of + "which take tokens from the shard before, and model.strategy megatron "
            "gathers all: use model.strategy auto or ulysses"
        )
    given = [
        name
        for name in ("attention_gate", "query_key_norm", "sinks")
        if getattr(model, name)
    ]
    if given and not model.attending_kinds():
        raise ValueError(
            f"{of}none of which has model.{given[0]}: leave it out, or name full, "
            "window or sparse in the pattern, too"
        )
    if model.lora is not None:
        raise ValueError(
            of + "whose projections have no adapters: leave model.lora out, or use "
            "full, window and sparse alone"
        )


def _check_class(value: Any, cls: Any, what: str) -> None:
    """Such as a mesh of devices, or a dict, in the place of a section's fields."""
    if not isinstance(value, cls):
        example = {"Mesh": "data=2, seq=4", "Model": "width=256"}.get(
            cls.__name__, "..."
        )
        raise ValueError(
            f"{what} is a ulysses_jax.config.{cls.__name__}, not {_short(value)}: "
            f"give ulysses_jax.config.{cls.__name__}({example})"
        )


def _short(value: Any) -> str:
    """Its class, and itself where that is a name or a number."""
    cls = type(value)
    module = "" if cls.__module__ == "builtins" else f"{cls.__module__}."
    said = f" {value!r}" if isinstance(value, str | int | os.PathLike) else ""
    return f"the {module}{cls.__qualname__}{said}"


def _default_pattern(model: Model) -> tuple[str, ...]:
    if model.window is not None and model.sparse is not None:
        raise ValueError(
            "model.window and model.sparse are of layers of kind window and of kind "
            "sparse: say in model.pattern which come when, or set one of them to null"
        )
    if model.sparse is not None:
        return ("sparse",)
    return ("full",) if model.window is None else ("window",)


def _check_pattern(model: Model) -> None:
    """Which kinds there are is not known here: `models` has them, or a user."""
    pattern, layers = model.pattern, model.num_layers
    if not pattern:
        raise ValueError(
            "model.pattern is empty: name the kinds of layers that repeat along the "
            "depth, such as full, or leave it out"
        )
    if len(pattern) > layers:
        raise ValueError(
            f"model.pattern names {len(pattern)} kinds of layers, but model.num_layers "
            f"is {layers}: use at least {len(pattern)} layers, or a pattern of at most "
            f"{layers}"
        )
    if "window" in pattern and model.window is None:
        raise ValueError(
            f"model.pattern {', '.join(pattern)} has layers of kind window, but "
            "model.window does not say how many tokens they see: set it, or use full "
            "in place of window"
        )
    if "window" not in pattern and model.window is not None:
        known = {"full", "sparse", *RECURRENT}
        own = ", ".join(kind for kind in pattern if kind not in known)
        raise ValueError(
            f"model.window {model.window} is of layers of kind window, but "
            f"model.pattern {', '.join(pattern)} has none"
            + f" ({own} is no kind of this library's)" * bool(own)
            + ": put window into the pattern, or set model.window to null"
        )
    if "sparse" in pattern and model.sparse is None:
        raise ValueError(
            f"model.pattern {', '.join(pattern)} has layers of kind sparse, but "
            "model.sparse does not say which blocks they see: set it, or use full in "
            "place of sparse"
        )
    if "sparse" not in pattern and model.sparse is not None:
        raise ValueError(
            f"model.sparse {model.sparse} is of layers of kind sparse, but "
            f"model.pattern {', '.join(pattern)} has none: put sparse into the "
            "pattern, or set model.sparse to null"
        )
    turns, rest = divmod(model.sparse_local_blocks, model.sparse_global_blocks)
    if model.sparse == "fixed" and (rest or not turns):
        raise ValueError(
            f"model.sparse_global_blocks {model.sparse_global_blocks} does not divide "
            f"model.sparse_local_blocks {model.sparse_local_blocks}: use 1"
        )
    if model.sparse_by_head and model.sparse not in ("fixed", "bigbird"):
        raise ValueError(
            f"model.sparse_by_head is of fixed and bigbird, not of {model.sparse}: "
            "leave it out"
        )


def _folder(folder: str | None, name: str) -> str:
    """The run's: ~ is the home folder, as in a shell, which does not see it after =."""
    if folder is None:
        return f"runs/{name}"
    found = os.path.expanduser(folder)
    if not found.strip():
        why = "it is empty"
    elif "://" in found:
        raise ValueError(
            f"run.folder {folder} is not of a file system, and a run locks, appends to "
            "and renames its files: mount the bucket (docs/checkpoints.md says how) and"
            " give the folder there; or train in a folder on a disk, and copy it later"
        )
    elif found[0] == "~":
        why = f"there is no home folder {found.split('/')[0]}"
    else:
        return found
    raise ValueError(
        f"run.folder {folder!r} names no folder ({why}): leave it out for runs/{name}, "
        "or write ./ before the name"
    )


def _check_memory(memory: Memory, model: Model, training: Training) -> None:
    if memory.auto:
        return  # they are replaced
    if memory.remat == "none" and "inputs" in memory.offload:
        raise ValueError(
            "memory.offload inputs moves what remat keeps, but memory.remat none keeps "
            "everything: use another memory.remat, or do not offload inputs"
        )
    if memory.remat == "none" and "parameters" in memory.offload:
        raise ValueError(
            "memory.offload parameters fetches a layer's parameters once more for its "
            "backward pass, but memory.remat none keeps what the first fetch brought: "
            "use another memory.remat, or do not offload parameters"
        )
    if memory.remat == "products" and memory.sequence_chunk_tokens is not None:
        raise ValueError(
            "memory.remat products keeps what a layer's products give, but layers in "
            "chunks of memory.sequence_chunk_tokens compute them again: use "
            "memory.remat attention, or no chunks"
        )
    if training.zero_stage < 3 and "parameters" in memory.offload:
        raise ValueError(
            "memory.offload parameters fetches a device's own part of each layer, but "
            f"training.zero_stage {training.zero_stage} keeps all parameters on every "
            "device: use training.zero_stage 3, or do not offload parameters"
        )
    moved = model.width - memory.kept_features(model.width)
    if memory.offload_fraction < 1 and ("inputs" not in memory.offload or not moved):
        raise ValueError(
            f"memory.offload_fraction {memory.offload_fraction} moves nothing: it is of"
            f" the {model.width} features that memory.offload inputs moves; offload "
            "inputs, with a larger fraction, or leave it at 1"
        )
    if memory.remat != "attention" and "attention" in memory.offload:
        raise ValueError(
            "memory.offload attention moves attention's outputs, which memory.remat "
            f"{memory.remat} does not keep apart: use memory.remat attention, or do "
            "not offload attention"
        )
    if memory.sequence_chunk_tokens is None and "keys" in memory.offload:
        raise ValueError(
            "memory.offload keys moves the keys and values of a layer in chunks: set "
            "memory.sequence_chunk_tokens, or do not offload keys"
        )
    if "keys" in memory.offload and not model.attending_kinds():
        raise ValueError(
            "memory.offload keys moves the keys and values of layers that attend, and "
            f"model.pattern {', '.join(model.pattern or ())} has none: do not offload "
            "keys"
        )
    attends_in_pieces = in_pieces(model, memory) and model.attending_kinds()
    if attends_in_pieces and model.attention == "reference":
        raise ValueError(
            "model.attention reference cannot attend to some keys at a time, as "
            "memory.sequence_chunk_tokens and memory.head_chunks ask: use "
            "model.attention auto or blockwise"
        )
