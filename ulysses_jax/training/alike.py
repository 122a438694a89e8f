"""What all processes of a pod must have in common, compared before the first step."""

import hashlib
import json
import platform
import socket
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

import jax
from jax.sharding import Mesh

from ulysses_jax.config import Config
from ulysses_jax.roll_call import Absent
from ulysses_jax.training import store
from ulysses_jax.training.preflight import flat

_FACTS = "ulysses_jax/facts"
_WAIT_SECONDS = 60
# Process 0 may be its own host's `localhost`.
_OWN = ("distributed.coordinator", "distributed.process_id")
_PACKAGE = Path(__file__).resolve().parents[1]


def refuse_others(configs: Sequence[Config]) -> None:
    """Refuses a process whose config, code or versions are not those of process 0.

    Raises:
      Absent: process 0 does not say what it has.
      ValueError: in that process, with what differs, here and there.
    """
    if not jax.distributed.is_initialized():
        return
    me, host = store.this_process(), socket.gethostname()
    facts = {"host": host} | facts_of(configs)
    store.set_again(f"{_FACTS}/{me}", json.dumps(facts))
    try:
        first = json.loads(store.wait(f"{_FACTS}/0", _WAIT_SECONDS))
    except jax.errors.JaxRuntimeError:
        raise Absent(
            f"process 0 on {store.coordinator()[0]} started, and did not say within "
            f"{_WAIT_SECONDS} s what it is to run: its own output says why, if it could"
        ) from None
    if differ := unlike(facts, first):
        raise ValueError(
            f"process {me} on {host} is not as process 0 on {first['host']}: "
            f"{'; '.join(differ)}: start all with one command, one config and one "
            "installation"
        )


def refuse_mixed_devices(mesh: Mesh) -> None:
    """Refuses a mesh of several kinds of devices: one program runs on all.

    Raises:
      ValueError: with the kinds, and the processes that have them.
    """
    kinds: dict[str, set[int]] = {}
    for device in mesh.devices.flat:
        kinds.setdefault(device.device_kind, set()).add(device.process_index)
    if len(kinds) > 1:
        listed = "; ".join(f"{k}: processes {sorted(v)}" for k, v in kinds.items())
        raise ValueError(
            f"the mesh is of {len(kinds)} kinds of devices ({listed}): start the run "
            "on hosts of one kind"
        )


def facts_of(configs: Sequence[Config]) -> dict[str, str]:
    """Each field of the configs, the code's digest and the versions, by name."""
    facts = {
        "python": platform.python_version(),
        "the code of ulysses_jax": _code(),
        **{name: version(name) for name in ("jax", "jaxlib", "flax", "optax")},
    }
    for number, config in enumerate(configs, 1):
        stage = f"stage {number}: " if len(configs) > 1 else ""
        for name, value in flat(config.to_dict()).items():
            if name not in _OWN:
                facts[f"{stage}{name}"] = str(value)
    return facts


def unlike(here: Mapping[str, str], there: Mapping[str, str]) -> list[str]:
    """`name is X, there Y` of each fact that differs, the host's name aside."""
    return [
        f"{name} is {here.get(name, 'absent')}, there {there.get(name, 'absent')}"
        for name in {**here, **there}
        if name != "host" and here.get(name) != there.get(name)
    ]


@cache
def _code() -> str:
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(_PACKAGE)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]
