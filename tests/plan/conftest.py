"""The plan's command without the CUDA plugin: a worker that answers what is planted."""

import dataclasses
import json
import sys
from functools import partial

import jax
import pytest
import yaml
from jax.sharding import AxisType, PartitionSpec

from ulysses_jax.config_file import load
from ulysses_jax.costs.targets import TARGETS
from ulysses_jax.mesh import make_mesh
from ulysses_jax.placement import place
from ulysses_jax.plan import plan as plan_module
from ulysses_jax.plan.compile import analyse, compile_on
from ulysses_jax.plan.worker import plan_step
from ulysses_jax.training import step as step_module
from ulysses_jax.training.step import make_train_step

CONFIG = {
    "model": {
        "vocab_size": 256,
        "width": 128,
        "num_layers": 2,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_size": 16,
        "feed_forward_width": 256,
    },
    "data": {"mask_documents": False},
    "training": {"batch_size": 4, "sequence_tokens": 1024},
    "mesh": {"fsdp": 2, "seq": 4},
}


@pytest.fixture(scope="session")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("configs") / "small.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def analysis(config_file):
    """What is read off the small config's step, compiled for 8 CPU devices."""
    config = load(config_file)
    mesh = make_mesh(**dataclasses.asdict(config.mesh), axis_type=AxisType.Explicit)
    program = compile_on(place(config, dict(mesh.shape)), mesh)
    return analyse(program, TARGETS["h100"], 8)


@pytest.fixture
def plant_needless_gather(monkeypatch):
    """Called, it makes each step that is compiled gather the whole embedding, too."""

    def wasteful(config, make_model):
        step = make_train_step(config, make_model)

        def with_fault(state, batch):
            whole = jax.sharding.reshard(state.parameters["embedding"], PartitionSpec())
            state, metrics = step(state, batch)
            return state, metrics | {"planted": jax.numpy.sort(whole.reshape(-1))[0]}

        return with_fault

    return lambda: monkeypatch.setattr(step_module, "make_train_step", wasteful)


@pytest.fixture
def plant_worker(monkeypatch):
    """`plant_worker(code)` makes each compile run this Python instead."""

    def plant(code):
        worker = (sys.executable, "-c", code)
        planted = partial(plan_step, worker=worker)
        monkeypatch.setattr(plan_module, "plan_step", planted)

    return plant


@pytest.fixture
def planted(plant_worker, analysis, tmp_path):
    """Each compile finds the analysis of the small config, and notes its request."""
    answer, requests = tmp_path / "answer.json", tmp_path / "requests"
    answer.write_text(json.dumps({"result": analysis}))
    requests.write_text("")
    plant_worker(
        "import sys\n"
        f"open({str(requests)!r}, 'a').write(sys.stdin.read() + '\\n')\n"
        f"open(sys.argv[1], 'w').write(open({str(answer)!r}).read())"
    )

    def read():
        return [json.loads(line) for line in requests.read_text().splitlines()]

    return read
