"""A run as frozen, validated dataclasses."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from ulysses_jax.strategies import Strategy, num_members


@dataclass(frozen=True)
class Run:
    folder: str | None = None
    """Where the run's files go; default runs/<the config file's name>."""
    seed: int = 0
    """0 to 2^32 - 1."""
    simulated_cpu_devices: int | None = None
    """Run on the CPU as this many devices; a device count in XLA_FLAGS wins."""


@dataclass(frozen=True)
class Rope:
    """Rotary positions: how fast each pair of a head's features turns.

    Pair i turns by `position * base**(-2 i / H)`, where scaling is none.
    """

    base: float = 500_000.0
    window_base: float | None = None
    """Of layers of kind window, which are not scaled then, as in Gemma 3; default: they
    turn as the others."""
    fraction: float = 1.0
    """Of a head's features, the first ones, that are turned at all."""
    scaling: Literal["none", "linear", "dynamic", "llama3", "yarn", "longrope"] = "none"
    """How a model is stretched to longer sequences than it was trained for
    (`models.rope.frequencies` has the formulas)."""
    factor: float = 1.0
    """By which it is stretched."""
    original_tokens: int | None = None
    """Of a sequence, that it was trained for before; all but linear read it."""
    low_frequency_factor: float = 1.0
    """llama3: what turns fewer times in original_tokens is slowed by factor,"""
    high_frequency_factor: float = 4.0
    """and what turns more often is left."""
    beta_fast: float = 32.0
    """yarn: what turns more often in original_tokens is left,"""
    beta_slow: float = 1.0
    """and what turns fewer times is slowed by factor."""
    truncate: bool = True
    """yarn: these two bounds fall on whole pairs."""
    attention_factor: float | None = None
    """yarn and longrope: cosines and sines are multiplied by it; default: what their
    papers say."""
    short_factors: tuple[float, ...] = ()
    """longrope: by which each pair is slowed, up to original_tokens,"""
    long_factors: tuple[float, ...] = ()
    """and in longer sequences."""


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
    norm: Literal["rms", "zero_centered_rms", "layer"] = "rms"
    """zero_centered_rms: RMSNorm whose scale is one and what is learned."""
    norm_epsilon: float = 1e-5
    post_norms: bool = False
    """What attention and feed-forward give is normed before it is added, too."""
    query_key_norm: bool = False
    """Queries and keys are normed over a head's features, before they are turned."""
    feed_forward: Literal["swiglu", "geglu", "gelu"] = "swiglu"
    positions: Literal["rope", "learned"] = "rope"
    rope: Rope = field(default_factory=Rope)
    max_positions: int | None = None
    """Rows of a learned position table; default: training.sequence_tokens."""
    biases: bool = False
    """Of attention's and the feed-forward's products."""
    attention_biases: Literal["none", "inputs", "all"] | None = None
    """Of attention's products; inputs: of queries, keys and values. Default: all where
    there are biases, else none."""
    attention_scale: float | None = None
    """By which queries times keys are multiplied; default: 1 / sqrt(head_size)."""
    tied_embeddings: bool = False
    embedding_scale: float = 1.0
    """By which a token's embedding is multiplied, in the compute dtype."""
    pattern: tuple[str, ...] | None = None
    """Kinds of layers, which repeat along the depth; the last time may be cut short.
    full: attends to all tokens before; window: to those in model.window; sparse: to
    blocks of them, by model.sparse. Default: window where model.window is set, sparse
    where model.sparse is, else full."""
    window: int | None = None
    """Layers of kind window attend only to keys fewer than this many positions away."""
    sparse: Literal["fixed", "strided", "longformer", "bigbird"] | None = None
    """Which blocks of keys a block of queries sees in layers of kind sparse. fixed: its
    own group of blocks, and the last blocks of each group before; strided: the last
    blocks, and of those before every so many-th; longformer: the last blocks and the
    first; bigbird: these and random ones."""
    sparse_block_tokens: int = 128
    """Tokens of a block."""
    sparse_local_blocks: int = 4
    """Blocks of a group, or the last ones that are seen, its own among them."""
    sparse_global_blocks: int = 1
    """The last of each group (fixed), or the first of all (longformer, bigbird)."""
    sparse_random_blocks: int = 1
    """Of bigbird."""
    sparse_by_head: bool = False
    """Each head sees others: of each group of fixed, or random ones of bigbird."""
    attention: Literal["auto", "cudnn", "mosaic", "blockwise", "reference"] = "auto"
    """What a device computes; auto: the best for the devices and the mask."""
    sinks: bool = False
    """Each head of attention learns the logit of one more key, whose value is 0."""
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
    from_: str | None = None
    """`from` in a file and on the command line: a Hugging Face folder whose weights a
    run starts from, and whose config.json says all fields above that are not given."""

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward multiplies two products."""
        return self.feed_forward != "gelu"

    def kinds(self) -> tuple[str, ...]:
        """Of every layer of a completed model, from the first on."""
        assert self.pattern, "complete.complete_model fills it in"
        repeats = math.ceil(self.num_layers / len(self.pattern))
        return (self.pattern * repeats)[: self.num_layers]

    def windows(self) -> tuple[int | None, ...]:
        """Of every layer: how many tokens it sees; None: all."""
        return tuple(self.window if kind == "window" else None for kind in self.kinds())


@dataclass(frozen=True)
class Data:
    files: str = "stdlib"
    """A folder, a glob, a file, or "stdlib": the running Python's own source text."""
    validation_fraction: float = 0.05
    """Of the bytes, as whole files and the end of one."""
    mask_documents: bool = True
    """Documents packed into one sequence do not see each other."""
    document_tokens: int | None = None
    """The mean length of a document, by which the plan counts attention's work; null:
    as if a sequence were one."""


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
    """The cheapest of the options below that fit, in place of what they say, but for
    loss_tile_tokens and head_chunks; as a whole section, `memory: auto`."""
    remat: Literal["none", "full", "attention", "products"] = "full"
    """What the backward pass recomputes: nothing; each layer from its input; all of it
    but attention, whose output and logsumexp are kept (the memory of a second input,
    and no second attention); or all but attention and what matrix products and
    exchanges give, which leaves norms and activations."""
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
    head_chunks: int | None = None
    """Groups in which a device's heads are projected, exchanged and attended, one
    group's exchange under another's attention; null: as many as save time, by a model
    of the links that seq runs over (`plan.head_chunks`)."""
    sequence_chunk_tokens: int | None = None
    """Tokens of a device that go through a layer at a time, attention and feed-forward:
    of all others there are only the layer's input, keys and values; default: all."""

    @property
    def recomputes_products(self) -> bool:
        return self.remat in ("full", "attention")

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

    def to_dict(self) -> dict[str, Any]:
        """Nested, as `config_file.from_dict` reads it."""
        return dataclasses.asdict(self, dict_factory=_without_underscores)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def padded_tokens(self) -> int:
        """The sequence length on the mesh: rounded up to a multiple of ring x seq, and
        where attention goes by blocks to blocks (in zigzag order half-blocks) of an
        even length, which cuDNN asks for."""
        shards = self.mesh.ring * self.mesh.seq
        members = self._members()
        if members > 1:
            halves = 2 if self.zigzag_members() > 1 else 1
            shards = math.lcm(shards, 2 * halves * members)
        return math.ceil(self.training.sequence_tokens / shards) * shards

    def residual_tokens(self) -> int:
        """Of a placed config: the tokens of a row that a device has of the residual
        stream (`sharding.residual`)."""
        mesh = self.mesh
        tokens = self.padded_tokens() // (mesh.ring * mesh.seq)
        return tokens if tokens % mesh.tensor else tokens // mesh.tensor

    def zigzag_members(self) -> int:
        """Of a placed config: over how many members a row's tokens lie in zigzag order
        (`parallel.zigzag.zigzag_ranges`); 1: they lie in the sequence's own."""
        return self._members() if self.model.zigzag else 1

    def _members(self) -> int:
        """Over how many members attention goes block by block."""
        strategy, mesh = self.model.strategy, self.mesh
        if strategy == "auto":
            return 1
        return num_members(strategy, mesh.ring, mesh.seq)


def _without_underscores(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Names as a file has them: from_ is from."""
    return {name.rstrip("_"): value for name, value in pairs}


def in_pieces(model: Model, memory: Memory) -> bool:
    """Whether layers run as `memory.layer_in_pieces`, which recomputes in any case.

    Groups of heads do under the strategy ulysses, where products are recomputed; else
    the strategy itself has them.
    """
    groups = (memory.head_chunks or 1) > 1 and memory.recomputes_products
    groups &= model.strategy in ("auto", "ulysses")
    return groups or memory.sequence_chunk_tokens is not None
