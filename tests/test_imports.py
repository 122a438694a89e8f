"""The rooms' imports point one way, and importing the library starts no backend."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "ulysses_jax"

# Each room, and all the rooms that it may import; a room may always import itself.
BASE = {
    "strategies",
    "config",
    "complete",
    "fields",
    "rotary",
    "lora",
    "lengths",
    "mesh",
    "sharding",
}
ATTENTION = BASE | {"parallel", "attention"}
ALLOWED = {
    "strategies": set(),
    "ids": set(),
    "outside": set(),
    "launcher": set(),
    "roll_call": set(),
    "aborts": set(),
    "run_folder": set(),
    "config": {"strategies"},
    "fields": set(),
    "rotary": {"config"},
    "lora": {"config"},
    "lengths": {"config"},
    "complete": {"config", "fields", "lengths", "lora", "rotary"},
    "config_file": {"config", "complete", "fields", "run_folder"},
    "mesh": set(),
    "distributed": {"aborts", "launcher", "roll_call"},
    "sharding": {"config", "mesh"},
    "layout": BASE,
    "weights": BASE | {"layout"},
    "parallel": BASE,
    "attention": BASE,
    "placement": BASE | {"parallel"},
    "data": BASE | {"parallel", "run_folder", "config_file", "outside"},
    "attend": ATTENTION,
    "api": ATTENTION | {"attend", "ids"},
    "recur": ATTENTION | {"api", "ids"},
    "linear": ATTENTION | {"recur"},
    "low_rank": ATTENTION | {"linear", "recur"},
    "flax_attention": ATTENTION | {"api"},
}
ALLOWED["families"] = {"config", "complete", "run_folder", "outside"}
ALLOWED["config_file"] |= {"families"}
ALLOWED["models"] = ATTENTION | {"attend", "ids", "layout", "linear", "weights"}
ALLOWED["models"] |= {"recur"}
ALLOWED["memory"] = ALLOWED["models"] | {"models"}
ALLOWED["__init__"] = ALLOWED["models"] | {
    "models",
    "api",
    "flax_attention",
    "linear",
    "low_rank",
    "recur",
}
ALLOWED["costs"] = ATTENTION | {"placement"}
ALLOWED["tensors"] = ALLOWED["models"] | {"models", "families", "outside"}
ALLOWED["training"] = (
    ALLOWED["memory"]
    | ALLOWED["costs"]
    | {"memory", "data", "costs", "config_file", "run_folder", "tensors", "outside"}
    | {"aborts", "roll_call"}
)
ALLOWED["interop"] = ALLOWED["training"] | {"training", "families"}
ALLOWED["inference"] = ALLOWED["interop"] | {"interop", "distributed"}
ALLOWED["generate"] = ALLOWED["inference"] | {"inference"}
ALLOWED["export"] = {"interop", "config_file", "run_folder", "training", "families"}
ALLOWED["retrieval"] = {"inference", "data", "training"}
ALLOWED["evaluate"] = ALLOWED["retrieval"] | {"run_folder"}
ALLOWED["check_links"] = {"costs", "inference", "mesh", "training"}
ALLOWED["plan"] = ALLOWED["training"] | {"training"}
ALLOWED["check_gpu"] = ALLOWED["plan"] | {"plan"}
ALLOWED["runs"] = {"run_folder", "training", "config_file", "outside"}
ALLOWED["train"] = ALLOWED["training"] | {"training", "distributed"}


def room_of(module: str) -> str:
    """`ulysses_jax.models.layer -> models`; the package itself is `__init__`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported_rooms(source: str, module: str, names: set[str]) -> set[str]:
    """The rooms that a module's source imports, wherever in it, relatively too."""
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            modules = [base]
            if base == PACKAGE:  # `from ulysses_jax import models` is a room, too
                modules = [
                    f"{base}.{alias.name}" if alias.name in names else base
                    for alias in node.names
                ]
        else:
            continue
        rooms |= {room_of(m) for m in modules if m.split(".")[0] == PACKAGE}
    return rooms


def modules() -> dict[str, Path]:
    files = sorted((ROOT / PACKAGE).rglob("*.py"))
    named = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in files}
    assert len(named) > 10
    return named


def backward_arrows(module: str, source: str, names: set[str]) -> set[str]:
    room = room_of(module)
    return imported_rooms(source, module, names) - ALLOWED[room] - {room}


def test_every_room_is_known():
    rooms = {room_of(module) for module in modules()}
    assert rooms <= set(ALLOWED), "a new room: say in ALLOWED what it may import"


@pytest.mark.parametrize("module", modules())
def test_imports_point_one_way(module):
    names = {room_of(m) for m in modules()}
    back = backward_arrows(module, modules()[module].read_text(), names)
    assert not back, f"{module} imports {back}"


def test_the_order_itself_has_no_cycle():
    for room, below in ALLOWED.items():
        for other in below:
            assert room not in ALLOWED[other], (room, other)


@pytest.mark.parametrize(
    "module, line, room",
    [
        ("ulysses_jax.attention.mask", "import ulysses_jax.parallel.ring", "parallel"),
        ("ulysses_jax.parallel.ring", "from ulysses_jax.attention import mask", None),
        ("ulysses_jax.parallel.ring", "from ..attention.mask import Mask", "attention"),
        ("ulysses_jax.mesh", "from ulysses_jax import sharding", "sharding"),
        (
            "ulysses_jax.data.packing",
            "def f():\n from ..models import layer",
            "models",
        ),
        ("ulysses_jax.models.layer", "from ulysses_jax import make_mesh", "__init__"),
    ],
)
def test_an_arrow_that_points_back_is_seen(module, line, room):
    names = {"sharding", "models", "attention", "parallel"}
    assert backward_arrows(module, line, names) == {room or "attention"}


def test_importing_starts_no_backend():
    """A program must still be able to choose its platform, or to be one of many."""
    script = f"""
import {PACKAGE}
for name in {sorted(m for m in modules() if not m.endswith("__main__"))!r}:
    __import__(name.removesuffix(".__init__"))
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 3)
assert jax.device_count() == 3
assert xla_bridge.backends_are_initialized()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
