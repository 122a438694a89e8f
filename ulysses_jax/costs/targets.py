"""The GPUs that a plan can compile for, each figure with its source."""

import difflib
import re
from dataclasses import dataclass, replace
from typing import Any

GB, TB = 10**9, 10**12
GIB = 2**30


@dataclass(frozen=True)
class Target:
    """A GPU, and the node and network it usually sits in.

    Bandwidths are peaks of one GPU in one direction, in bytes a second; memory is what
    CUDA offers a process, in bytes.
    """

    name: str
    description: str
    memory_bytes: int
    bf16_flops_per_second: float
    """Peak dense bfloat16 matrix FLOP/s, without sparsity."""
    memory_bytes_per_second: float
    nvlink_bytes_per_second: float
    network_bytes_per_second: float
    """InfiniBand, or Ethernet of the same speed."""
    pcie_bytes_per_second: float
    host_memory_bytes: int
    """Of a node, unless the user says otherwise."""
    # What kernels reach of these peaks; estimates, used by predictions alone.
    matmul_efficiency: float
    attention_efficiency: float
    """Flash attention, forward and backward together, causal, head size 128."""
    nvlink_efficiency: float
    network_efficiency: float
    pcie_efficiency: float
    # What XLA's cost model and code generation read.
    compute_capability: tuple[int, int]
    num_cores: int
    fp32_units_per_core: int
    clock_ghz: float
    l2_cache_bytes: int
    shared_memory_per_core_bytes: int
    shared_memory_per_block_bytes: int
    nvlinks: int

    def peak_flops_per_second(self, dtype: str) -> float:
        """Of matrix products in "bfloat16", or "float32": JAX multiplies it as TF32.

        TF32 has half of bfloat16's peak on every one of these, by their datasheets.
        """
        return self.bf16_flops_per_second / (1 if dtype == "bfloat16" else 2)

    def xla_text(self) -> str:
        """The target as XLA's `GpuTargetConfigProto`, in text form."""
        major, minor = self.compute_capability
        accelerated = major >= 9
        suffix = "a" if accelerated else ""
        extension = "ACCELERATED_FEATURES" if accelerated else "NONE"
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared_memory_per_core_bytes}
  shared_memory_per_block_optin: {self.shared_memory_per_block_bytes}
  core_count: {self.num_cores} fpus_per_core: {self.fp32_units_per_core}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {int(self.memory_bytes_per_second)}
  l2_cache_size: {self.l2_cache_bytes} clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.memory_bytes} device_address_bits: 64 ecc_enabled: true
  cuda_compute_capability {{
    major: {major} minor: {minor} feature_extension: {extension}
  }}
  device_vendor: "NVIDIA Corporation" name: "{self.description}"
  platform_version: "Compute Capability {major}.{minor}{suffix}"
  pcie_bandwidth: {int(self.pcie_bytes_per_second)}
  driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
  device_interconnect_info {{ active_links: {self.nvlinks} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{self.description}"
"""


# Sources. Peaks, HBM and NVLink: NVIDIA's datasheets of the A100, H100, H200, HGX and
# DGX B200; a datasheet's NVLink figure counts both directions, halved here, and its
# "with sparsity" peaks are halved too. Network, host memory and PCIe: NVIDIA's user
# guides of the DGX A100, DGX H100/H200 and DGX B200 (one network adapter a GPU). Memory
# that CUDA offers, cores, clocks, caches: as those cards describe themselves through
# CUDA, which OpenXLA records in xla/backends/gpu/target_config/specs.
#
# Efficiencies are estimates. Attention: FlashAttention-2's paper (arXiv 2307.08691)
# has 73 % of an A100's peak forward and 63 % backward; FlashAttention-3's (arXiv
# 2407.08608) 570 to 650 TFLOP/s forward and 500 to 560 backward, causal, for cuDNN 9
# and itself on an H100. Matrix products: what cuBLAS is commonly seen to reach at these
# shapes. Links: NCCL's bus bandwidths commonly seen, 350 of 450 GB/s and 45 of 50; of
# pinned memory over PCIe, 55 of 64.
AMPERE = dict(
    matmul_efficiency=0.80,
    attention_efficiency=0.62,
    nvlink_efficiency=0.78,
    network_efficiency=0.90,
    pcie_efficiency=0.86,
)
HOPPER = AMPERE | dict(matmul_efficiency=0.70, attention_efficiency=0.55)
BLACKWELL = AMPERE | dict(matmul_efficiency=0.70, attention_efficiency=0.50)

A100_40 = Target(
    name="a100-40",
    description="NVIDIA A100-SXM4-40GB",
    memory_bytes=42_298_834_944,  # of 40 GB; specs/a100_sxm_40
    bf16_flops_per_second=312e12,  # A100 datasheet
    memory_bytes_per_second=1_555 * GB,  # A100 datasheet
    nvlink_bytes_per_second=300 * GB,  # 600 GB/s both ways, A100 datasheet
    network_bytes_per_second=25 * GB,  # ConnectX-6 200 Gb/s, DGX A100 guide
    pcie_bytes_per_second=32 * GB,  # Gen4 x16, A100 datasheet
    host_memory_bytes=1 * TB,  # DGX A100 320GB guide
    **AMPERE,
    compute_capability=(8, 0),
    num_cores=108,
    fp32_units_per_core=64,
    clock_ghz=1.41,
    l2_cache_bytes=41_943_040,
    shared_memory_per_core_bytes=167_936,
    shared_memory_per_block_bytes=166_912,
    nvlinks=12,
)
H100 = Target(
    name="h100",
    description="NVIDIA H100 80GB HBM3",
    memory_bytes=84_942_979_072,  # of 80 GB; specs/h100_sxm
    bf16_flops_per_second=989.4e12,  # 1,979 with sparsity, both datasheets
    memory_bytes_per_second=3_350 * GB,  # H100 SXM datasheet
    nvlink_bytes_per_second=450 * GB,  # 900 GB/s both ways, both datasheets
    network_bytes_per_second=50 * GB,  # ConnectX-7 400 Gb/s, DGX H100/H200
    pcie_bytes_per_second=64 * GB,  # Gen5 x16, both datasheets
    host_memory_bytes=2 * TB,  # DGX H100/H200 guide
    **HOPPER,
    compute_capability=(9, 0),
    num_cores=132,
    fp32_units_per_core=128,
    clock_ghz=1.98,
    l2_cache_bytes=52_428_800,
    shared_memory_per_core_bytes=233_472,
    shared_memory_per_block_bytes=232_448,
    nvlinks=18,
)
B200 = Target(
    name="b200",
    description="NVIDIA B200",
    memory_bytes=191_514_411_008,  # of 180 GB (192 on chip); specs/b200
    bf16_flops_per_second=2_250e12,  # 36e15 sparse for 8, HGX B200 datasheet
    memory_bytes_per_second=8_000 * GB,  # 64 TB/s for 8, DGX B200 datasheet
    nvlink_bytes_per_second=900 * GB,  # 1.8 TB/s both ways, HGX B200 datasheet
    network_bytes_per_second=50 * GB,  # ConnectX-7 400 Gb/s, DGX B200 datasheet
    pcie_bytes_per_second=64 * GB,  # Gen5 x16, DGX B200 guide
    host_memory_bytes=2 * TB,  # DGX B200 datasheet (up to 4 TB)
    **BLACKWELL,
    compute_capability=(10, 0),
    num_cores=148,
    fp32_units_per_core=128,
    clock_ghz=1.965,
    l2_cache_bytes=132_644_864,
    shared_memory_per_core_bytes=233_472,
    shared_memory_per_block_bytes=232_448,
    nvlinks=18,
)

TARGETS = {
    target.name: target
    for target in (
        A100_40,
        replace(
            A100_40,
            name="a100-80",
            description="NVIDIA A100-SXM4-80GB",
            memory_bytes=85_100_068_864,  # of 80 GB; specs/a100_sxm_80
            memory_bytes_per_second=2_039 * GB,  # A100 datasheet
            host_memory_bytes=2 * TB,  # DGX A100 640GB guide
        ),
        H100,
        replace(
            H100,
            name="h200",
            description="NVIDIA H200",
            memory_bytes=int(139.8 * GIB),  # of 141 GB, as CUDA prints it
            memory_bytes_per_second=4_800 * GB,  # H200 datasheet
        ),
        B200,
    )
}


def parse_gpus(text: str) -> tuple[Target, int, int]:
    """Reads a cluster such as "h100:1x8": a GPU, hosts x GPUs a host.

    Returns:
      The target, the number of hosts, the number of GPUs on each.

    Raises:
      ValueError: malformed, or a GPU that is not in TARGETS.
    """
    match = re.fullmatch(r"([^:]+):([1-9]\d*)x([1-9]\d*)", text.strip())
    name = match[1].strip().lower() if match else text.split(":")[0].strip().lower()
    if name and name not in TARGETS:
        close = difflib.get_close_matches(name, TARGETS, n=1, cutoff=0.6)
        close = [each for each in TARGETS if each.startswith(name)] + close
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(
            f"unknown GPU {name!r}: {hint}valid are {', '.join(TARGETS)}, "
            "e.g. --gpus h100:1x8"
        )
    if match is None:
        raise ValueError(
            f"cannot read the GPUs {text!r}: write GPU:HOSTSxGPUS_A_HOST, e.g. "
            f"{name or 'h100'}:1x8 or {name or 'h100'}:128x8"
        )
    return TARGETS[name], int(match[2]), int(match[3])


def target_of(device: Any) -> Target | None:
    """The target that describes a device that is there, by its name."""
    names = (t for t in TARGETS.values() if t.description == device.device_kind)
    return next(names, None)
