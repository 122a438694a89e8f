"""A run: its sections, and what follows from several of them."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from ulysses_jax.config.memory import Memory
from ulysses_jax.config.model import Model
from ulysses_jax.strategies import num_members

Curriculum = Literal["uniform", "grow-linear", "grow-p2"]


@dataclass(frozen=True)
class Run:
    folder: str | None = None
    """Where the run's files go; default runs/<the config file's name>."""
    after: str | None = None
    """Another run's folder, whose last parameters this one starts from."""
    seed: int = 0
    """0 to 2^32 - 1."""
    simulated_cpu_devices: int | None = None
    """Run on the CPU as this many devices; a device count in XLA_FLAGS wins."""
    wandb: bool = False
    """Rows go to Weights & Biases too, by its package, which is to be installed."""


@dataclass(frozen=True)
class Data:
    files: str = "stdlib"
    """A folder, a glob or a file, of text, JSON lines (.jsonl, .jsonl.gz, .json.gz) or
    tables (.parquet, .arrow); a folder that `python -m ulysses_jax.data prepare` wrote;
    or "stdlib": the running Python's own source text."""
    mixture: tuple[str, ...] = ()
    """Instead of files: several, each as files is; rows are drawn by weights."""
    weights: tuple[float, ...] = ()
    """How often a row is drawn of each of the mixture, relative to the others."""
    text_field: str = "text"
    """The field of JSON lines, or column of tables, that holds the text."""
    validation_fraction: float = 0.05
    """Of the bytes, as whole files and the end of one."""
    mask_documents: bool = True
    """Documents packed into one sequence do not see each other."""
    packing: Literal["stream", "whole"] = "stream"
    """stream: rows are cut from documents laid end to end. whole: a row has whole
    documents, and padding; only one that is longer than a row is split."""
    balance: bool = False
    """Each step's rows are dealt to (data, fsdp) so that attention's work is the same:
    which rows a step has stays, which device has them follows from the mesh."""
    lengths: tuple[int, ...] = ()
    """Rows of several lengths, powers of 2 up to training.sequence_tokens: a row is of
    one document, a step of one length, all steps of as many tokens."""
    curriculum: Curriculum = "grow-p2"
    """Of lengths: by which odds the short ones come first; uniform: not at all."""
    cycle_steps: int | None = None
    """Of lengths: steps in which they grow once, then anew; null: those of the run, or
    of a pass over the data where that is less."""
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
    optimizer: Literal["adamw", "muon", "lion", "adafactor", "sgd"] = "adamw"
    """adamw, lion: read beta1 and beta2. muon: orthogonal steps of the matrices inside
    layers, whose momentum is beta1, and AdamW's of all else, at one learning rate.
    adafactor: factored second moments, no first; reads neither, and learning_rate is
    relative to each parameter. sgd: momentum beta1."""
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
    checkpoint_interval_minutes: float = 30.0
    """Also after so long, by process 0's clock: what is lost is bounded by both."""
    keep_checkpoints: int = 2
    skipped_steps: int = 0
    """So many in a row may have a loss or gradients that are not finite: each changes
    nothing but its number, and is written down. 0: the run ends at the first."""
    spike_nats: float | None = None
    """A step's loss so far above the median of the last 50 is a spike: the run goes
    back to its last checkpoint, and on from there with the next batch; null: never."""
    hang_minutes: float | None = None
    """A program ends when it waits longer for a step's numbers, its batch or a save;
    null: 10 minutes, and five times the longest step so far; for a save 30 minutes, and
    one for each 3 GB of it."""


@dataclass(frozen=True)
class Mesh:
    """Degrees of the mesh axes, outermost first; one may be -1: what is left."""

    data: int = 1
    fsdp: int = 1
    ring: int = 1
    seq: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class Distributed:
    """How processes find each other where SLURM, Kubernetes or OpenMPI do not say."""

    coordinator: str | None = None
    """host:port of process 0."""
    num_processes: int | None = None
    process_id: int | None = None
    wait_seconds: float = 300.0
    """For a process that is not there when the others are. They say which it is."""


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
    profile: tuple[int, ...] = ()
    """The first and the last step to trace into the run's folder."""

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

    def balanced_groups(self) -> int:
        """Of a placed config: over how many groups of devices rows are dealt by their
        work (`data.balance.deal`); 1: they stay in order."""
        return self.mesh.data * self.mesh.fsdp if self.data.balance else 1

    def _members(self) -> int:
        """Over how many members attention goes block by block."""
        strategy, mesh = self.model.strategy, self.mesh
        if strategy == "auto":
            return 1
        return num_members(strategy, mesh.ring, mesh.seq)


def _without_underscores(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Names as a file has them: from_ is from."""
    return {name.rstrip("_"): value for name, value in pairs}
