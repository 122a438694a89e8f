"""A plan: what a run needs on a cluster, as one dict that JSON can hold."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from ulysses_jax.config import Config, Memory, in_pieces
from ulysses_jax.costs.head_chunks import place_on
from ulysses_jax.costs.predict import check_kinds, predict
from ulysses_jax.costs.reckoning import reckon
from ulysses_jax.costs.targets import Target
from ulysses_jax.memory.auto import Fit, choose, rungs
from ulysses_jax.models.kinds import refuse_unknown
from ulysses_jax.placement import place
from ulysses_jax.plan.compile import mesh_degrees
from ulysses_jax.plan.worker import plan_step

GIB = 2**30


@dataclass(frozen=True)
class Cluster:
    """Hosts of GPUs, and how to compile for them."""

    target: Target
    hosts: int
    gpus_per_host: int
    host_memory_bytes: int | None = None
    """Of a host; None: the target's."""
    timeout_seconds: float = 900
    """Of one compile."""
    use_cache: bool = True

    @property
    def name(self) -> str:
        return f"{self.target.name}:{self.hosts}x{self.gpus_per_host}"

    @property
    def num_devices(self) -> int:
        return self.hosts * self.gpus_per_host


def make_plan(config: Config, cluster: Cluster) -> dict[str, Any]:
    """Compiles a run's step for a cluster and says what it will need.

    Returns:
      `gpus`, `fits`, `num_devices`, `tokens` (of a sequence), `batch_size`, `mesh`,
      `strategy`, `head_chunks`; `memory`, `traffic`, `overlap`, `copies`, `warnings`:
      read off the compiled program (`compile.analyse`); `predicted`: by formula and
      schedule (`predict`); `reckoning`: the strategies side by side, by formula
      (`reckon`); `compile_seconds`; `advice`: what to change first where it does not
      fit.
      `overlap.exchange_fraction` is None where nothing is exchanged (seq=1). With
      `memory.auto`, `auto`: what was tried (`memory.auto.choose`), and `memory_options`
      of the first that fits, whose plan this is.

    Raises:
      ValueError: with `memory.auto`, nothing fits.
      PlanError, ValueError: as `worker.plan_step`, and `degrees_on`.
    """
    config = placed_on(config, cluster)  # or refuse, before compiling
    if config.memory.auto:
        return _choose_memory(config, cluster)
    found = plan_step(
        config,
        cluster.target,
        cluster.hosts,
        cluster.gpus_per_host,
        host_memory_bytes=cluster.host_memory_bytes,
        timeout_seconds=cluster.timeout_seconds,
        use_cache=cluster.use_cache,
    )
    plan = {
        "gpus": cluster.name,
        "fits": found["memory"]["fits"],
        "num_devices": found["num_devices"],
        "tokens": config.training.sequence_tokens,
        "batch_size": found["batch_size"],
        "accumulation_steps": config.training.accumulation_steps,
        "mesh": found["mesh"],
        "strategy": config.model.strategy,
        "head_chunks": config.memory.head_chunks,
        "reckoning": reckon(config, cluster.target, cluster.gpus_per_host),
        "predicted": predict(config, cluster.target, found),
        "advice": advice(found["memory"], config, cluster),
    }
    return found | plan


def _choose_memory(config: Config, cluster: Cluster) -> dict[str, Any]:
    plans: dict[Memory, dict[str, Any]] = {}

    def compiled(candidate: Config) -> Fit:
        plan = plans[candidate.memory] = make_plan(candidate, cluster)
        memory = plan["memory"]
        return Fit(
            memory["device_bytes"] + memory["estimated_bytes"],
            memory["limit_bytes"],
            memory["host_bytes_per_device"],
            memory["host_limit_bytes_per_node"] // cluster.gpus_per_host,
        )

    host = cluster.host_memory_bytes or cluster.target.host_memory_bytes
    limits = Fit(0, cluster.target.memory_bytes, 0, host // cluster.gpus_per_host)
    chosen, trials = choose(config, compiled, limits)
    for trial, (_, memory) in zip(trials, rungs(config), strict=False):
        if memory in plans:
            trial["step_seconds"] = plans[memory]["predicted"]["step_seconds"]
    options = dataclasses.asdict(chosen.memory)
    return plans[chosen.memory] | {"auto": trials, "memory_options": options}


def placed_on(config: Config, cluster: Cluster) -> Config:
    """`head_chunks.place_on` a cluster.

    Raises:
      ValueError: as `refuse_unknown`, `check_kinds`, `degrees_on` and `place`.
    """
    refuse_unknown(config.model.kinds())
    check_kinds(config.model)
    degrees = degrees_on(config, cluster)
    return place_on(config, degrees, cluster.target, cluster.gpus_per_host)


def degrees_on(config: Config, cluster: Cluster) -> dict[str, int]:
    """The mesh of a run on a cluster.

    Raises:
      ValueError: it does not match; the message has the arguments of one that works.
    """
    try:
        return mesh_degrees(
            config, cluster.target, cluster.hosts, cluster.gpus_per_host
        )
    except ValueError as error:
        works = matching_mesh(config, cluster.num_devices)
        raise ValueError(f"{error}; this works: {works}" if works else error) from None


def matching_mesh(config: Config, num_devices: int) -> str:
    """Arguments of a mesh that takes the devices; "" where none does.

    The nearest to the config's: first its batch, then its tensor, its ring and its seq
    degree are kept if they can be; fsdp and data take what is left.
    """
    mesh, training = config.mesh, config.training
    steps = training.accumulation_steps or 1

    def distance(degree: int, wanted: int) -> float:
        # A degree of -1 wants all there is.
        return abs(math.log2(degree / (wanted if wanted > 0 else num_devices)))

    found = []
    for tensor in _divisors(num_devices):
        for ring, seq in _pairs(num_devices // tensor):
            heads = config.model.num_heads / (tensor * seq)
            if heads % (config.memory.head_chunks or 1):  # nor is one cut in two
                continue
            rows = num_devices // (tensor * ring * seq)
            data = rows if mesh.data == -1 else math.gcd(rows, max(mesh.data, 1))
            degrees = dict(
                data=data, fsdp=rows // data, ring=ring, seq=seq, tensor=tensor
            )
            batch_size = math.lcm(training.batch_size, rows * steps)
            run = dataclasses.replace(
                config, training=dataclasses.replace(training, batch_size=batch_size)
            )
            try:
                place(run, degrees)
            except ValueError:
                continue
            grows = batch_size / training.batch_size
            order = (
                grows,
                distance(tensor, mesh.tensor),
                distance(ring, mesh.ring),
                distance(seq, mesh.seq),
            )
            found.append((order, degrees, batch_size))
    if not found:
        return ""
    _, degrees, batch_size = min(found, key=lambda each: each[0])
    values = {f"mesh.{axis}": degree for axis, degree in degrees.items()}
    values["training.batch-size"] = batch_size
    before = {f"mesh.{axis}": n for axis, n in dataclasses.asdict(mesh).items()}
    before["training.batch-size"] = training.batch_size
    return " ".join(f"--{k} {v}" for k, v in values.items() if v != before[k])


def _pairs(n: int) -> list[tuple[int, int]]:
    """(ring, seq) whose product divides n."""
    return [(ring, seq) for ring in _divisors(n) for seq in _divisors(n // ring)]


def _divisors(n: int) -> list[int]:
    return [each for each in range(1, n + 1) if n % each == 0]


def advice(memory: dict[str, Any], config: Config, cluster: Cluster) -> str:
    """What to change first where a step does not fit; "" where it does."""
    if memory["fits"]:
        return ""
    if memory["free_bytes"] >= 0:
        remedy = "shorten the sequence, or give the hosts more memory"
        if "inputs" in config.memory.offload and config.memory.offload_fraction == 1:
            share = "keep an eighth of the inputs on the GPU"
            remedy = f"{share} (--memory.offload-fraction 0.875), {remedy}"
        return remedy
    tokens = config.training.sequence_tokens
    state = sum(
        memory[f"{name}_bytes"] for name in ("parameters", "optimizer", "gradients")
    )
    budget = memory["limit_bytes"] - memory["estimated_bytes"]
    offload = config.memory.offload
    if memory["host_bytes_per_node"] > memory["host_limit_bytes_per_node"]:
        return (
            "GPUs and hosts are both too small: shorten the sequence, or spread it "
            "over more hosts"
        )
    if state > budget / 2:
        words = [word for word in ("optimizer", "parameters") if word not in offload]
        host = f"--memory.offload {' '.join([*offload, *words[:1]])}"
        return (
            f"parameters, optimizer and gradients alone take {state / GIB:.1f} GiB: "
            f"{f'keep more of it in host memory ({host}), ' if words else ''}"
            f"divide them over more GPUs (--gpus {cluster.target.name}:"
            f"{2 * cluster.hosts}x{cluster.gpus_per_host} "
            f"{matching_mesh(config, 2 * cluster.num_devices)}), or take a GPU with "
            "more memory"
        )
    if config.memory.remat == "none":
        return "keep only the inputs of layers: --memory.remat full"
    if not in_pieces(config.model, config.memory):
        return (
            "take the cheapest of tiles, offload and chunks of tokens that fits: "
            "--memory.auto"
        )
    # Activations grow with the tokens of a device.
    fits = int(tokens * (budget - state) / memory["activations_bytes"])
    return (
        f"activations take {memory['activations_bytes'] / GIB:.1f} GiB: spread a "
        f"sequence over more GPUs (mesh.seq, now {config.mesh.seq}), or take at most "
        f"about {fits // 1024 * 1024:,} tokens (--longest finds out)"
    )


def with_tokens(config: Config, tokens: int) -> Config:
    """The run at another sequence length; learned positions grow with it."""
    model = config.model
    if model.positions == "learned":
        model = dataclasses.replace(model, max_positions=tokens)
    training = dataclasses.replace(config.training, sequence_tokens=tokens)
    return dataclasses.replace(config, model=model, training=training)
