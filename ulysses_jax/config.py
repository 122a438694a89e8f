"""A run as frozen, validated dataclasses: YAML in, any field from the command line."""

import argparse
import dataclasses
import difflib
import math
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
import yaml

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    folder: str | None = None
    """Where the run's files go; default runs/<the config file's name>."""
    seed: int = 0
    """0 to 2^32 - 1."""
    simulated_cpu_devices: int | None = None
    """Run on the CPU as this many devices; a device count in XLA_FLAGS wins."""


@dataclass(frozen=True)
class Model:
    """A decoder-only transformer; the defaults are Llama's choices."""

    vocab_size: int = 320
    width: int = 256
    num_layers: int = 4
    num_heads: int = 8
    num_kv_heads: int | None = None
    """Default: num_heads."""
    head_size: int | None = None
    """Default: width / num_heads."""
    feed_forward_width: int | None = None
    """Default: 4 x width."""
    norm: Literal["rms", "layer"] = "rms"
    norm_epsilon: float = 1e-5
    feed_forward: Literal["swiglu", "gelu"] = "swiglu"
    positions: Literal["rope", "learned"] = "rope"
    rope_base: float = 500_000.0
    max_positions: int | None = None
    """Rows of a learned position table; default: training.sequence_tokens."""
    biases: bool = False
    tied_embeddings: bool = False
    window: int | None = None
    """Attend only to keys fewer than this many positions away."""
    attention: Literal["auto", "blockwise", "cudnn", "reference"] = "auto"
    """What a device computes; auto: the best for the devices and the mask."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"


@dataclass(frozen=True)
class Data:
    files: str = "stdlib"
    """A folder, a glob, a file, or "stdlib": the running Python's own source text."""
    validation_fraction: float = 0.05
    """Of the files."""
    mask_documents: bool = True
    """Documents packed into one sequence do not see each other."""


@dataclass(frozen=True)
class Training:
    num_steps: int = 1000
    batch_size: int = 8
    """Sequences a step, over all devices and accumulation steps."""
    sequence_tokens: int = 2048
    accumulation_steps: int | None = 1
    """Parts of a step; null: one sequence of each (data, fsdp) at a time."""
    learning_rate: float = 3e-4
    """The peak, reached after warmup_steps; then a cosine to final_learning_rate."""
    final_learning_rate: float = 3e-5
    warmup_steps: int = 100
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0
    validation_interval_steps: int = 100
    """0: only at the end."""
    validation_batches: int = 8
    """0: none."""
    checkpoint_interval_steps: int = 500
    keep_checkpoints: int = 2


@dataclass(frozen=True)
class Mesh:
    """Degrees of the mesh axes, outermost first; one may be -1: what is left."""

    data: int = 1
    fsdp: int = 1
    ring: int = 1
    seq: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class Memory:
    remat: Literal["none", "full", "attention"] = "full"
    """What the backward pass recomputes: nothing; each layer from its input; or all of
    it but attention, whose output and logsumexp are kept (the memory of a second input,
    and no second attention)."""
    remat_layers: int = 1
    """Layers that are recomputed together, from the input of the first."""
    offload: Literal["none", "inputs"] = "none"
    """What waits for the backward pass in the host's memory: the inputs that remat
    keeps."""
    loss_tile_tokens: int = 1024
    """Tokens of a device whose logits exist at once."""
    mlp_tile_tokens: int | None = None
    """Tokens of a device whose feed-forward activations exist at once; default: all.
    Tiles of a few thousand lose no speed; a device with fewer tokens has no tiles."""
    head_chunks: int = 1
    """Groups in which a device's heads are exchanged and attended."""


@dataclass(frozen=True)
class Distributed:
    """How processes find each other where SLURM, Kubernetes or OpenMPI do not say."""

    coordinator: str | None = None
    """host:port of process 0."""
    num_processes: int | None = None
    process_id: int | None = None


@dataclass(frozen=True)
class Config:
    run: Run = field(default_factory=Run)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    training: Training = field(default_factory=Training)
    mesh: Mesh = field(default_factory=Mesh)
    memory: Memory = field(default_factory=Memory)
    distributed: Distributed = field(default_factory=Distributed)
    quiet: bool = False
    """Plain lines for a log instead of a live progress bar."""

    def to_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)

    def padded_tokens(self) -> int:
        """The sequence length on the mesh: rounded up to a multiple of ring x seq."""
        shards = self.mesh.ring * self.mesh.seq
        return math.ceil(self.training.sequence_tokens / shards) * shards


def load_from_command_line(argv: Sequence[str], *, program: str) -> Config:
    """Reads `--config FILE` and overrides of any field, such as `--mesh.seq 4`.

    Raises:
      ValueError: as `load`.
      SystemExit: for the command line's own errors, and for --help.
    """
    parser = argparse.ArgumentParser(prog=program, add_help=False, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE")
    own, overrides = parser.parse_known_args(argv)
    if own.config is None:
        if {"-h", "--help"} & set(
            overrides
        ):  # without a file: the fields' own defaults
            tyro.cli(Config, args=overrides, prog=f"{program} --config FILE")
        raise ValueError("say which run: --config configs/tiny.yaml")
    return load(own.config, overrides, program=f"{program} --config {own.config}")


def load(path: str | Path, argv: Sequence[str] = (), *, program: str = "") -> Config:
    """Reads a YAML file, applies command-line overrides, fills in what follows.

    Raises:
      ValueError: an unknown key, a wrong type or an impossible value, by name.
      SystemExit: for the command line's own errors, and for --help.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ValueError(f"cannot read the config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    config = from_dict(Config, {} if values is None else values, where=f"{path}: ")
    if argv:
        words = _as_tyro_writes(argv)
        config = tyro.cli(Config, default=config, args=words, prog=program or None)
    return complete(config, name=path.stem)


def _as_tyro_writes(argv: Sequence[str]) -> list[str]:
    """YAML's null, true and false after an option, as tyro wants them said."""
    words: list[str] = []
    for word in argv:
        option, _, value = word.rpartition("=")
        if not option and words and words[-1].startswith("--"):
            option, value = words[-1], word
        value = value.lower()
        if option and value in ("null", "true", "false"):
            if words and words[-1] == option:
                words.pop()
            section, _, name = option.removeprefix("--").rpartition(".")
            dot = "." if section else ""
            word = {
                "null": f"{option}=None",
                "true": option,
                "false": f"--{section}{dot}no-{name}",
            }[value]
        words.append(word)
    return words


def complete(config: Config, *, name: str) -> Config:
    """Fills in the fields that follow from others, and checks each on its own."""
    _check_ranges(config)
    model, training = config.model, config.training
    if model.head_size is None and model.width % model.num_heads:
        raise ValueError(
            f"model.width {model.width} does not divide by model.num_heads "
            f"{model.num_heads}: change one, or set model.head_size"
        )
    filled = dict(
        num_kv_heads=model.num_kv_heads or model.num_heads,
        head_size=model.head_size or model.width // model.num_heads,
        feed_forward_width=model.feed_forward_width or 4 * model.width,
        max_positions=(model.max_positions or training.sequence_tokens)
        if model.positions == "learned"
        else None,
    )
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(model, **filled),
        run=dataclasses.replace(config.run, folder=config.run.folder or f"runs/{name}"),
    )
    _check_model(config.model, training)
    _check_memory(config.memory, config.model)
    return config


def place(config: Config, degrees: dict[str, int]) -> Config:
    """The config on a mesh of these degrees; checks that everything divides.

    Raises:
      ValueError: with the numbers and what would fit, before anything is compiled.
    """
    model, training = config.model, config.training
    if degrees["ring"] > 1:
        raise ValueError(
            f"mesh.ring {degrees['ring']}: tokens are spread over seq alone; use "
            f"mesh.ring 1 and mesh.seq {degrees['ring'] * degrees['seq']}"
        )
    tensor = degrees["tensor"]
    split = ("num_heads", "num_kv_heads", "feed_forward_width", "vocab_size")
    for name in (*split, "max_positions"):
        size = getattr(model, name) or 0
        if size % tensor:
            fits = [n for n in range(1, tensor) if size % n == 0]
            raise ValueError(
                f"model.{name} {size} does not divide over mesh.tensor {tensor}: use "
                f"mesh.tensor {' or '.join(map(str, fits))}, or a {name} of "
                f"{math.ceil(size / tensor) * tensor}"
            )
    rows = degrees["data"] * degrees["fsdp"]
    steps = training.accumulation_steps or max(training.batch_size // rows, 1)
    if training.batch_size % (rows * steps):
        fits = math.ceil(training.batch_size / (rows * steps)) * rows * steps
        raise ValueError(
            f"training.batch_size {training.batch_size} does not divide over mesh.data "
            f"{degrees['data']} x mesh.fsdp {degrees['fsdp']} x "
            f"training.accumulation_steps {steps}: use a batch_size of {fits}"
        )
    return dataclasses.replace(
        config,
        mesh=Mesh(**degrees),
        training=dataclasses.replace(training, accumulation_steps=steps),
    )


def from_dict(cls: type[T], values: Any, *, where: str = "") -> T:
    """Builds a dataclass from nested dicts; every key and type must be right.

    Raises:
      ValueError: names the field, and for an unknown one the nearest valid name.
    """
    return _build(cls, values, where, ())


def _build(cls: Any, values: Any, where: str, path: tuple[str, ...]) -> Any:
    if not isinstance(values, dict):
        name = ".".join(path) or "the config"
        raise ValueError(f"{where}{name} is a section of fields, not {values!r}")
    hints = get_type_hints(cls)
    built = {}
    for key, value in values.items():
        name = ".".join((*path, str(key)))
        if key not in hints:
            raise ValueError(f"{where}unknown field {name!r}{_nearest(str(key), path)}")
        if dataclasses.is_dataclass(hints[key]):
            built[key] = _build(hints[key], value, where, (*path, key))
        else:
            built[key] = _value(hints[key], value, f"{where}{name}")
    return cls(**built)


def _value(hint: Any, value: Any, name: str) -> Any:
    options = (
        get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    )
    for option in options:
        if get_origin(option) is Literal:
            if value in get_args(option) and not isinstance(value, bool):
                return value
        elif option is float and not isinstance(value, bool):
            try:  # YAML reads 3e-4, without a dot, as a string
                return float(value)
            except (TypeError, ValueError):
                continue
        elif type(value) is option:
            return value
    wanted = " or ".join(
        " | ".join(map(repr, get_args(option)))
        if get_origin(option) is Literal
        else "null"
        if option is types.NoneType
        else option.__name__
        for option in options
    )
    raise ValueError(f"{name} must be {wanted}, not {value!r}")


def _nearest(key: str, path: tuple[str, ...]) -> str:
    """Suggests the valid field whose name is most like `key`, in any section."""
    names = {
        ".".join(("" if s is None else s, f)).strip("."): f for s, f in _all_fields()
    }
    here = {n: f for n, f in names.items() if n.split(".")[:-1] == list(path)}
    for candidates in (here, names):
        close = difflib.get_close_matches(key, candidates.values(), n=1, cutoff=0.6)
        if close:
            full = next(n for n, f in candidates.items() if f == close[0])
            return f"; did you mean {full!r}?"
    return f"; valid here: {', '.join(here.values())}"


def _all_fields() -> list[tuple[str | None, str]]:
    pairs: list[tuple[str | None, str]] = []
    for section, hint in get_type_hints(Config).items():
        pairs.append((None, section))
        if dataclasses.is_dataclass(hint):
            pairs += [(section, f.name) for f in dataclasses.fields(hint)]
    return pairs


_MAY_BE_ZERO = {
    "seed",
    "validation_fraction",
    "warmup_steps",
    "weight_decay",
    "learning_rate",
    "final_learning_rate",
    "validation_interval_steps",
    "validation_batches",
    "process_id",
    "beta1",
    "beta2",
}


def _check_ranges(config: Config) -> None:
    """Numbers are positive, or not negative; fractions lie below 1."""
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        if not dataclasses.is_dataclass(values) or section.name == "mesh":
            continue
        for each in dataclasses.fields(values):
            value = getattr(values, each.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            low = 0 if each.name in _MAY_BE_ZERO else sys.float_info.min
            name = f"{section.name}.{each.name}"
            if not math.isfinite(value) or value < low:
                bound = "not negative" if low == 0 else "positive"
                raise ValueError(f"{name} must be {bound}, not {value}")
            if each.name == "seed" and value >= 2**32:
                raise ValueError(f"{name} must be below 2^32, not {value}")
            if each.name in ("validation_fraction", "beta1", "beta2") and value >= 1:
                raise ValueError(f"{name} must be below 1, not {value}")


def _check_model(model: Model, training: Training) -> None:
    assert model.num_kv_heads and model.head_size
    if model.num_heads % model.num_kv_heads:
        fits = [n for n in range(1, model.num_heads + 1) if model.num_heads % n == 0]
        raise ValueError(
            f"model.num_kv_heads {model.num_kv_heads} does not divide model.num_heads "
            f"{model.num_heads}: use one of {fits}"
        )
    if model.positions == "rope" and model.head_size % 2:
        raise ValueError(
            f"model.head_size {model.head_size} is odd: RoPE turns pairs; use "
            f"{model.head_size + 1}"
        )
    if model.max_positions and model.max_positions < training.sequence_tokens:
        raise ValueError(
            f"model.max_positions {model.max_positions} is less than "
            f"training.sequence_tokens {training.sequence_tokens}: raise it"
        )


def _check_memory(memory: Memory, model: Model) -> None:
    if model.num_layers % memory.remat_layers:
        layers = model.num_layers
        fits = [n for n in range(1, layers + 1) if layers % n == 0]
        raise ValueError(
            f"memory.remat_layers {memory.remat_layers} does not divide "
            f"model.num_layers {layers}: use one of {fits}"
        )
    if memory.remat == "none" and memory.offload != "none":
        raise ValueError(
            f"memory.offload {memory.offload} moves what remat keeps, but memory.remat "
            "none keeps everything: use memory.remat full or attention, or "
            "memory.offload none"
        )
    if memory.remat == "none" and memory.remat_layers > 1:
        raise ValueError(
            f"memory.remat_layers {memory.remat_layers} recomputes layers together, "
            "but memory.remat none recomputes nothing: use memory.remat full or "
            "attention, or memory.remat_layers 1"
        )
