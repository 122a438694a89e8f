"""A run as frozen, validated dataclasses."""

import dataclasses
import math
import sys
from dataclasses import dataclass, field
from typing import Literal

import yaml

from ulysses_jax.spreading import (
    Strategy,
    check_head_chunks,
    check_split,
    check_strategy,
    num_members,
    received_bytes,
    strategy_of,
    total_bytes,
)


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
    strategy: Literal["auto"] | Strategy = "auto"
    """How attention reaches all tokens. ulysses: an exchange over seq; ring: blocks of
    keys go round ring; hybrid: both; all_gather: keys are gathered over seq; megatron:
    activations are, before attention and feed-forward, which split heads and features
    over seq. auto: what the mesh carries, and of ulysses and all_gather that which
    receives fewer bytes."""
    zigzag: bool | None = None
    """Tokens lie in zigzag order over the members that attend block by block, so that
    all work equally under a causal mask; default: where there are such members."""
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
    zero_stage: Literal[1, 2, 3] = 3
    """Of ZeRO: 1 cuts the optimizer's moments over fsdp, ring and seq, 2 the gradients
    too, 3 the parameters too: gathered in each layer instead of once a step."""
    label_smoothing: float = 0.0
    """Of the target distribution, this part is spread evenly over the vocabulary."""
    z_loss: float = 0.0
    """Weight of logsumexp(logits)^2 a token, as in PaLM, where it is 1e-4."""
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
    auto: bool = False
    """The cheapest of the options below that fit, in place of what they say; as a whole
    section, `memory: auto`."""
    remat: Literal["none", "full", "attention"] = "full"
    """What the backward pass recomputes: nothing; each layer from its input; or all of
    it but attention, whose output and logsumexp are kept (the memory of a second input,
    and no second attention)."""
    remat_layers: int = 1
    """Layers that are recomputed together, from the input of the first."""
    offload: tuple[
        Literal["inputs", "attention", "keys", "optimizer", "parameters"], ...
    ] = ()
    """What waits in the host's memory until it is used: inputs, those that remat keeps;
    attention, the outputs that remat attention keeps; keys, and values, of the layer
    that is computed, where sequence_chunk_tokens cuts it; optimizer, its moments;
    parameters, and their gradients."""
    offload_fraction: float = 1.0
    """Of each layer's input that offload inputs moves; the rest stays on the device,
    where the host's memory is what runs out first."""
    loss_tile_tokens: int = 1024
    """Tokens of a device whose logits exist at once."""
    mlp_tile_tokens: int | None = None
    """Tokens of a device whose feed-forward activations exist at once; default: all.
    Tiles of a few thousand lose no speed; a device with fewer tokens has no tiles."""
    head_chunks: int = 1
    """Groups in which a device's heads are projected, exchanged and attended."""
    sequence_chunk_tokens: int | None = None
    """Tokens of a device that go through a layer at a time, attention and feed-forward:
    of all others there are only the layer's input, keys and values; default: all."""

    def kept_features(self, width: int) -> int:
        """Features of a layer's input that stay on the device while the rest moves."""
        return round(width * (1 - self.offload_fraction)) * ("inputs" in self.offload)


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
        """The sequence length on the mesh: rounded up to a multiple of ring x seq, and
        in zigzag order to half-blocks of an even length, which cuDNN asks for."""
        shards = self.mesh.ring * self.mesh.seq
        if self.zigzag_members() > 1:
            shards = math.lcm(shards, 4 * self.zigzag_members())
        return math.ceil(self.training.sequence_tokens / shards) * shards

    def zigzag_members(self) -> int:
        """Of a placed config: over how many members a row's tokens lie in zigzag order
        (`spreading.zigzag_ranges`); 1: they lie in the sequence's own."""
        model, mesh = self.model, self.mesh
        if not model.zigzag or model.strategy == "auto":
            return 1
        return num_members(model.strategy, mesh.ring, mesh.seq)


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
    _check_memory(config.memory, config.model, training)
    return config


def place(config: Config, degrees: dict[str, int]) -> Config:
    """The config on a mesh of these degrees; checks that everything divides.

    Raises:
      ValueError: with the numbers and what would fit, before anything is compiled.
    """
    model, training = config.model, config.training
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
    chunk, shards = (
        config.memory.sequence_chunk_tokens,
        degrees["ring"] * degrees["seq"],
    )
    local_tokens = math.ceil(training.sequence_tokens / shards)
    if chunk and local_tokens > chunk and local_tokens % chunk:
        fair = next(n for n in range(chunk, 0, -1) if local_tokens % n == 0)
        fits = [
            n * chunk * shards
            for n in (local_tokens // chunk, local_tokens // chunk + 1)
        ]
        raise ValueError(
            f"memory.sequence_chunk_tokens {chunk} does not divide the {local_tokens} "
            f"tokens of a device (training.sequence_tokens {training.sequence_tokens} "
            f"over mesh.ring x mesh.seq {shards}): use sequence_tokens {fits[0]} or "
            f"{fits[1]}, or a chunk of {fair}"
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
        model=_with_strategy(model, config.memory, degrees),
        mesh=Mesh(**degrees),
        training=dataclasses.replace(training, accumulation_steps=steps),
    )


def in_pieces(model: Model, memory: Memory) -> bool:
    """Whether layers run as `models.pieces`, which recomputes in any case.

    Groups of heads do under the strategy ulysses, where there is rematerialisation;
    else the strategy itself has them.
    """
    groups = memory.head_chunks > 1 and memory.remat != "none"
    groups &= model.strategy in ("auto", "ulysses")
    return groups or memory.sequence_chunk_tokens is not None


def _with_strategy(model: Model, memory: Memory, degrees: dict[str, int]) -> Model:
    """Chooses where the config leaves it to the mesh, and checks what it says."""
    ring, seq, tensor = (degrees[axis] for axis in ("ring", "seq", "tensor"))
    assert model.num_kv_heads and model.head_size
    kv_heads = model.num_kv_heads // tensor
    strategy = model.strategy
    if strategy == "auto":
        strategy = strategy_of(ring, seq)
        # What all_gather lacks: groups of heads, layers in pieces, parts of the
        # reference, a window where an attention knows no positions.
        can_gather = (
            memory.head_chunks == 1
            and not (memory.sequence_chunk_tokens or memory.auto)
            and model.attention != "reference"
            and model.window is None
        )
        if strategy == "ulysses" and seq > 1 and can_gather:
            sizes = dict(
                tokens=1,
                num_heads=model.num_heads // tensor,
                num_kv_heads=kv_heads,
                head_size=model.head_size,
                itemsize=2 if model.compute_dtype == "bfloat16" else 4,
            )
            candidates: tuple[Strategy, ...] = ("ulysses", "all_gather")
            strategy = min(
                candidates,
                key=lambda each: total_bytes(
                    received_bytes(each, **sizes, ring=ring, seq=seq)
                ),
            )
    check_strategy(strategy, ring, seq)
    if memory.sequence_chunk_tokens and strategy != "ulysses":
        raise ValueError(
            "memory.sequence_chunk_tokens cuts up the strategy ulysses, not "
            f"{strategy}: use mesh.ring 1, mesh.seq {ring * seq} and model.strategy "
            "ulysses, or no chunks"
        )
    check_head_chunks(strategy, memory.head_chunks, kv_heads, seq)
    if strategy == "megatron":
        names = ("num_heads", "num_kv_heads", "feed_forward_width")
        sizes = {f"model.{name}": getattr(model, name) for name in names}
        check_split(sizes, degrees)
    by_blocks = num_members(strategy, ring, seq) > 1
    if by_blocks and model.attention == "reference":
        raise ValueError(
            f"model.attention reference attends to whole rows, but strategy {strategy} "
            "attends block by block: use model.attention auto or blockwise, or "
            f"mesh.ring 1, mesh.seq {ring * seq} and model.strategy ulysses"
        )
    zigzag = by_blocks if model.zigzag is None else model.zigzag
    return dataclasses.replace(model, strategy=strategy, zigzag=zigzag)


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
    "label_smoothing",
    "z_loss",
}
_BELOW_ONE = {"validation_fraction", "beta1", "beta2", "label_smoothing"}


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
            if each.name == "offload_fraction" and value > 1:
                raise ValueError(f"{name} must be at most 1, not {value}")
            if each.name in _BELOW_ONE and value >= 1:
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


def _check_memory(memory: Memory, model: Model, training: Training) -> None:
    if memory.auto:
        return  # they are replaced
    if model.num_layers % memory.remat_layers:
        layers = model.num_layers
        fits = [n for n in range(1, layers + 1) if layers % n == 0]
        raise ValueError(
            f"memory.remat_layers {memory.remat_layers} does not divide "
            f"model.num_layers {layers}: use one of {fits}"
        )
    if memory.remat == "none" and "inputs" in memory.offload:
        raise ValueError(
            "memory.offload inputs moves what remat keeps, but memory.remat none keeps "
            "everything: use memory.remat full or attention, or do not offload inputs"
        )
    if memory.remat == "none" and "parameters" in memory.offload:
        raise ValueError(
            "memory.offload parameters fetches a layer's parameters once more for its "
            "backward pass, but memory.remat none keeps what the first fetch brought: "
            "use memory.remat full or attention, or do not offload parameters"
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
    if in_pieces(model, memory) and model.attention == "reference":
        raise ValueError(
            "model.attention reference cannot attend to some keys at a time, as "
            "memory.sequence_chunk_tokens and memory.head_chunks ask: use "
            "model.attention auto or blockwise"
        )
    if memory.remat == "none" and memory.remat_layers > 1:
        raise ValueError(
            f"memory.remat_layers {memory.remat_layers} recomputes layers together, "
            "but memory.remat none recomputes nothing: use memory.remat full or "
            "attention, or memory.remat_layers 1"
        )
