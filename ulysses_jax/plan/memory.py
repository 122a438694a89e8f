"""What a step keeps on a GPU and its host: XLA's figures, and estimates of the rest."""

from collections.abc import Iterable
from typing import Any

import jax

from ulysses_jax.costs.collectives import Collective
from ulysses_jax.costs.hlo import Module
from ulysses_jax.costs.targets import Target
from ulysses_jax.memory.offload import HOST
from ulysses_jax.training.state import TrainState, shard_bytes

MIB = 2**20

# Kernels, their stacks and the libraries' handles: of the order that nvidia-smi shows
# of a process that has started CUDA, cuBLAS and cuDNN, and holds no array.
CUDA_CONTEXT_BYTES = 600 * MIB

# NCCL keeps, for each channel and connection, a buffer a protocol: 4 MiB (its default
# NCCL_BUFFSIZE), 0.5 MiB (LL), 4.7 MiB (LL128). Taken: 24 channels, a ring and a tree
# on each.
NCCL_COMMUNICATOR_BYTES = 24 * 2 * int(9.2 * MIB)

# Indices into a buffer beyond this do not fit 32 bits with a sign.
MAX_INT32_ELEMENTS = 2**31


def memory(
    stats: dict[str, int],
    state: TrainState,
    gradients: Any,
    module: Module,
    collectives: Iterable[Collective],
    target: Target,
    gpus_per_host: int,
    host_memory_bytes: int | None = None,
) -> dict[str, Any]:
    """Memory by what it holds, in bytes of one GPU unless the name says otherwise.

    Args:
      stats: fields of the compiled program's `memory_analysis()`, without "_in_bytes".
      state: abstract, with the shardings of the run.
      gradients: of all parameters, abstract likewise.
      host_memory_bytes: of a node; None: the target's.

    Returns:
      `device_bytes`, XLA's buffer assignment (arguments + temporaries + output - what
      the output shares with the arguments), and its parts: `parameters_bytes`,
      `optimizer_bytes`, `batch_bytes`, `gradients_bytes` (float32, of all parameters
      that lie there: clipping by the global norm needs them all at once),
      `activations_bytes` (activations and all other temporaries), `output_bytes` (what
      shares nothing). `estimated` lists what XLA does not see and why,
      `estimated_bytes` is their sum, `limit_bytes` what CUDA offers, `free_bytes` what
      is left (negative: missing); `host_bytes_per_device`, all that lies in the host's
      memory and in none of the parts above, and its parts `host_parameters_bytes`,
      `host_optimizer_bytes` and `host_temporaries_bytes` (gradients, layer inputs);
      `host_bytes_per_node`, `host_limit_bytes_per_node`, `fits`, and `large_buffers`:
      arrays of more than 2^31 elements, which a kernel that counts in 32 bits gets
      wrong.
    """
    parameters, host_parameters = _device_and_host((state.parameters, state.frozen))
    optimizer, host_optimizer = _device_and_host((state.optimizer, state.step))
    output = stats["output_size"] - stats["alias_size"]
    device = stats["argument_size"] + stats["temp_size"] + output
    gradients_bytes, _ = _device_and_host(gradients)
    gradients_bytes = min(gradients_bytes, stats["temp_size"])
    host = stats["host_argument_size"] + stats["host_temp_size"]
    host += stats["host_output_size"] - stats["host_alias_size"]
    host_limit = host_memory_bytes or target.host_memory_bytes
    extras = estimated_extras(module, collectives)
    estimated = sum(each["bytes"] for each in extras)
    free = target.memory_bytes - device - estimated
    return {
        "device_bytes": device,
        "parameters_bytes": parameters,
        "optimizer_bytes": optimizer,
        "batch_bytes": stats["argument_size"] - parameters - optimizer,
        "gradients_bytes": gradients_bytes,
        "activations_bytes": stats["temp_size"] - gradients_bytes,
        "output_bytes": output,
        "estimated_bytes": estimated,
        "estimated": extras,
        "limit_bytes": target.memory_bytes,
        "free_bytes": free,
        "host_bytes_per_device": host,
        "host_parameters_bytes": host_parameters,
        "host_optimizer_bytes": host_optimizer,
        "host_temporaries_bytes": host - host_parameters - host_optimizer,
        "host_bytes_per_node": host * gpus_per_host,
        "host_limit_bytes_per_node": host_limit,
        "fits": free >= 0 and host * gpus_per_host <= host_limit,
        "large_buffers": large_buffers(module),
        "xla": stats,
    }


def _device_and_host(tree: Any) -> tuple[int, int]:
    """Bytes of a GPU's shards of abstract arrays, by the memory where they lie."""
    leaves = jax.tree.leaves(tree)
    host = shard_bytes([x for x in leaves if x.sharding.memory_kind == HOST])
    return shard_bytes(leaves) - host, host


def estimated_extras(
    module: Module, collectives: Iterable[Collective]
) -> list[dict[str, Any]]:
    """Estimates of what a GPU holds beside XLA's buffers: `name`, `bytes`, `why`."""
    workspace = max(
        (
            4 * call.arrays[0].num_elements
            for _, call in module.top_level()
            if "fmha" in call.custom_call_target
            and "backward" in call.custom_call_target.lower()
            # A workspace that XLA knows is in its own figure.
            and not any(each.dtype == "u8" and each.dims[0] for each in call.arrays)
        ),
        default=0,
    )
    communicators = sorted({c.axes for c in collectives if c.group_size > 1})
    extras = [
        (
            "CUDA context",
            CUDA_CONTEXT_BYTES,
            "kernels and handles of CUDA, cuBLAS and cuDNN",
        ),
        (
            "NCCL buffers",
            NCCL_COMMUNICATOR_BYTES * len(communicators),
            f"one communicator for each of {', '.join(communicators) or 'no axis'}",
        ),
        (
            "cuDNN workspace",
            workspace,
            "attention's backward may sum dQ in float32: 4 bytes an element of the "
            "largest call",
        ),
    ]
    return [
        {"name": name, "bytes": size, "why": why} for name, size, why in extras if size
    ]


def large_buffers(module: Module) -> list[dict[str, Any]]:
    """Arrays of more than 2^31 elements: `array`, `num_elements`, and a `from` each."""
    found: dict[str, dict[str, Any]] = {}
    for _, each in module.top_level():
        if each.opcode in (
            "tuple",
            "while",
            "parameter",
            "get-tuple-element",
            "bitcast",
        ):
            continue
        for array in each.arrays:
            if array.num_elements > MAX_INT32_ELEMENTS:
                text = f"{array.dtype}[{','.join(map(str, array.dims))}]"
                found.setdefault(
                    text,
                    {
                        "array": text,
                        "num_elements": array.num_elements,
                        "instruction": each.name,
                        "from": each.op_name,
                    },
                )
    return sorted(found.values(), key=lambda each: -each["num_elements"])
