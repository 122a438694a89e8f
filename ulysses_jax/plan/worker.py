"""Compiles in a process of its own, and remembers on disk what came out.

XLA can abort, and a compile can take for ever: either becomes a message. As a module,
`python -m ulysses_jax.plan.worker RESULT.json`, it is that process: a request on stdin.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ulysses_jax.config import Config
from ulysses_jax.config_file import from_dict
from ulysses_jax.costs.targets import Target
from ulysses_jax.mesh import allow_promotion
from ulysses_jax.plan.compile import PlanError, analyse, compile_step, mesh_degrees

PACKAGE = Path(__file__).parents[1]
WORKER = (sys.executable, "-m", "ulysses_jax.plan.worker")
# For 64 GPUs that are not there XLA of jax 0.12 aborts where it fuses the sum of a
# scalar into a kernel of its own ("size mismatch when packing elements for LLVM
# struct"): a call of NCCL takes its place. As an option of one compile it does nothing.
_FLAG = "--xla_gpu_unsupported_use_all_reduce_one_shot_kernel=false"


def plan_step(
    config: Config,
    target: Target,
    hosts: int,
    gpus_per_host: int,
    *,
    host_memory_bytes: int | None = None,
    timeout_seconds: float = 900,
    use_cache: bool = True,
    worker: Sequence[str] = WORKER,
) -> dict[str, Any]:
    """Compiles a run's step for a cluster in its own process, and analyses it.

    Args:
      config: complete; a mesh degree of -1 takes the GPUs that the others leave.
      host_memory_bytes: of a node; None: the target's.
      worker: the command that compiles.

    Returns:
      `ulysses_jax.plan.compile.analyse`'s, and `is_cached`.

    Raises:
      PlanError: no CUDA plugin, a target that XLA refuses, a compile that fails, dies
        or takes longer than `timeout_seconds`.
      ValueError: a mesh or a config that does not fit the cluster.
    """
    mesh_degrees(config, target, hosts, gpus_per_host)  # before a process is started
    request = {
        "config": config.to_dict(),
        "target": dataclasses.asdict(target),
        "hosts": hosts,
        "gpus_per_host": gpus_per_host,
        "host_memory_bytes": host_memory_bytes,
    }
    file = cache_folder() / f"{_digest(request)}.json"
    if use_cache and (result := _read(file)) is not None:
        return result | {"is_cached": True}
    answer = _run(request, timeout_seconds, worker)
    if "error" in answer:
        raise (PlanError if answer["is_plan_error"] else ValueError)(answer["error"])
    if use_cache:
        _write(file, answer["result"])
    return answer["result"] | {"is_cached": False}


def cache_folder() -> Path:
    """Where results are kept: a folder in $XDG_CACHE_HOME, or in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ulysses_jax" / "plan"


def _run(
    request: dict[str, Any], timeout_seconds: float, worker: Sequence[str]
) -> dict[str, Any]:
    paths = [str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",  # the plugin would look for a GPU
        "XLA_FLAGS": f"{_FLAG} {os.environ.get('XLA_FLAGS', '')}",  # the last one wins
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        try:
            done = subprocess.run(
                [*worker, str(result)],
                input=json.dumps(request),
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_seconds,
                env=environment,
            )
        except subprocess.TimeoutExpired:
            raise PlanError(
                f"compiling took longer than {timeout_seconds:g} s and was stopped: "
                "allow more time (--timeout SECONDS), or plan fewer layers"
            ) from None
        answer = _read(result)
    if answer is None:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        code = done.returncode
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        raise PlanError(
            "\n  ".join([f"the compiler ended {how}; its last lines:", *lines[-8:]])
        )
    return answer


def _digest(request: dict[str, Any]) -> str:
    """Of what a result depends on: the request, the versions, this package's source."""
    config = {
        name: value
        for name, value in request["config"].items()
        if name not in ("run", "distributed", "quiet")
    }
    parts = [json.dumps(request | {"config": config}, sort_keys=True)]
    parts += [os.environ.get("XLA_FLAGS", ""), sys.version]
    for package in (
        "jax",
        "jaxlib",
        "jax-cuda13-plugin",
        "jax-cuda13-pjrt",
        "jax-cuda12-plugin",
        "jax-cuda12-pjrt",
        "nvidia-cudnn-cu13",
        "flax",
        "optax",
        "tokamax",
    ):
        try:
            parts.append(importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            parts.append("")
    digest = hashlib.sha256("\0".join(parts).encode())
    for source in sorted(PACKAGE.rglob("*.py")):
        digest.update(str(source.relative_to(PACKAGE)).encode() + source.read_bytes())
    return digest.hexdigest()[:32]


def _read(file: Path) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def _write(file: Path, result: dict[str, Any]) -> None:
    """Whole or not at all; a cache that cannot be written is only slower."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as part:
            json.dump(result, part)
        os.replace(part.name, file)
    except OSError:
        pass


@allow_promotion()
def main(result_file: str) -> None:
    """Reads a request from stdin, writes its result, or its error, as JSON."""
    request = json.load(sys.stdin)
    capability = tuple(request["target"]["compute_capability"])
    target = Target(**request["target"] | {"compute_capability": capability})
    config = from_dict(Config, request["config"])
    hosts, gpus_per_host = request["hosts"], request["gpus_per_host"]
    try:
        program = compile_step(config, target, hosts, gpus_per_host)
        memory = request["host_memory_bytes"]
        answer = {"result": analyse(program, target, gpus_per_host, memory)}
    except ValueError as error:
        answer = {
            "error": str(error),
            "is_plan_error": isinstance(error, PlanError),
        }
    Path(result_file).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1])
