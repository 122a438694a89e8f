"""Eight simulated CPU devices in one process, and programs that compile quickly.

No compilation cache on disk: XLA on the CPU (jax 0.10.2) runs collectives of a program
from there in no fixed order, so that devices wait for each other for ever.
"""

import gc
import importlib.metadata
import importlib.util
import os
from pathlib import Path

# A sixth of the time to compile. Tests ask for a program's values, collectives and
# memory, not for its speed. Where programs are compiled for GPUs they are a run's own.
QUICK = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if importlib.metadata.version("jax") < "0.11":
    QUICK.append("--xla_cpu_use_fusion_emitters=false")  # later XLA has no others
if importlib.util.find_spec("jax_cuda13_plugin") is None:
    os.environ["XLA_FLAGS"] = " ".join([*QUICK, os.environ.get("XLA_FLAGS", "")])

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_compilation_cache", False)


def pytest_collection_finish():
    """What is imported by now stays; of what JAX makes afterwards little is garbage in
    circles, and to look for it each time takes 7 % of the tests' time."""
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)


@pytest.fixture(scope="session", autouse=True)
def eight_devices():
    assert jax.device_count() == 8


@pytest.fixture
def no_launcher(monkeypatch):
    """Takes away what a launcher of the tests themselves may have set."""
    names = ("SLURM", "OMPI", "PMI", "MV2", "JSM", "FLUX", "MPI_LOCAL", "KUBERNETES")
    names += ("WORLD_SIZE", "RANK", "LOCAL_", "JOB_COMPLETION", "JAX_", "CUDA_VISIBLE")
    for name in os.environ:
        if name.startswith(names):
            monkeypatch.delenv(name)


# Two processes take whole files in this order: a long one at the end would run alone.
LONGEST = (
    "tests/test_pods.py",
    "tests/test_elastic.py",
    "tests/test_train.py",
    "tests/parallel/test_ring.py",
    "tests/models/test_calls.py",
    "tests/training/test_zero.py",
    "tests/attention/test_attentions.py",
    "tests/parallel/test_ulysses.py",
    "tests/test_api.py",
    "tests/memory/test_pieces.py",
    "tests/training/test_step.py",
    "tests/test_readme.py",
)


def pytest_collection_modifyitems(items):
    """The longest files first. As slow are marked the cases that vary what a cheaper
    one tests, by the beginnings of their names."""
    order = {file: place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.nodeid.split("::")[0], len(order)))
    path = Path(__file__).with_name("slow_cases.txt")
    for beginning in path.read_text().splitlines():
        found = [item for item in items if item.nodeid.startswith(beginning)]
        file = beginning.split("::")[0]
        whole = sum(item.nodeid.startswith(file) for item in items)
        assert found or whole < 10, f"{path.name}: no test begins with {beginning}"
        for item in found:
            item.add_marker(pytest.mark.slow)
