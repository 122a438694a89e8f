"""The built wheel works outside the clone; importing it touches nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

IMPORT = """
import os
import jax, flax.nnx, jaxtyping, numpy

read = []
get = os._Environ.__getitem__
def recorded(self, key):
    read.append(key)
    return get(self, key)
os._Environ.__getitem__ = recorded
import ulysses_jax
for name in ulysses_jax.__all__:
    getattr(ulysses_jax, name)
os._Environ.__getitem__ = get

from jax._src import xla_bridge
print(ulysses_jax.__file__)
print("read:", read, "backends:", list(xla_bridge._backends))
print(sorted(ulysses_jax.__all__))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, built and installed without its dependencies into a folder."""
    dist, site = (tmp_path_factory.mktemp(name) for name in ("dist", "site"))
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(dist)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = dist.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet"]
    pip += ["--disable-pip-version-check", "--target", str(site), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    return site


def run(site, folder, *command):
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={
            "PYTHONPATH": str(site),
            "JAX_PLATFORMS": "cpu",
            "PATH": "",
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),  # quick ones
        },
        capture_output=True,
        text=True,
    )


def test_the_wheel_imports_in_an_empty_folder(installed, tmp_path):
    done = run(installed, tmp_path, "-c", IMPORT)
    assert done.returncode == 0, done.stderr
    where, touched, names = done.stdout.splitlines()
    assert Path(where).is_relative_to(installed)
    assert touched == "read: [] backends: []"
    for name in ("attention_fn", "heads_to_seq", "make_mesh", "seq_to_heads"):
        assert name in names


TINY = """
model: {vocab_size: 264, width: 8, num_layers: 1, num_heads: 1}
data: {files: text.txt, validation_fraction: 0}
training: {num_steps: 1, batch_size: 1, sequence_tokens: 8, warmup_steps: 1}
"""


TRAINER = ("-m", "ulysses_jax.train", "--config", "mine.yaml")


def test_the_wheel_has_the_trainer(installed, tmp_path):
    """Up to the first thing that is refused with all modules imported."""
    (tmp_path / "mine.yaml").write_text(TINY)
    done = run(installed, tmp_path, *TRAINER)
    assert (done.returncode, done.stdout) == (2, "")
    want = "python -m ulysses_jax.train: data.files 'text.txt' "
    assert done.stderr.startswith(want)


@pytest.mark.slow
def test_the_wheel_trains(installed, tmp_path):
    (tmp_path / "mine.yaml").write_text(TINY)
    (tmp_path / "text.txt").write_text("a text to learn from " * 9)
    done = run(installed, tmp_path, *TRAINER)
    assert done.returncode == 0, done.stderr
    assert "runs/mine: final loss" in done.stdout
    assert (tmp_path / "runs" / "mine" / "checkpoints" / "1").is_dir()


def test_the_wheel_holds_every_module(installed):
    """And what else lies beside them, such as a page's script."""

    def files(root):
        found = (root / "ulysses_jax").rglob("*.*")
        return {p.relative_to(root) for p in found if "__pycache__" not in p.parts}

    assert files(installed) == files(ROOT)
    assert Path("ulysses_jax/runs/page.js") in files(installed)


def test_extras_and_bounds():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"gpu", "test", "dev"} <= project["optional-dependencies"].keys()
    assert any("jax[cuda13]" in x for x in project["optional-dependencies"]["gpu"])
    for dependency in project["dependencies"]:
        assert ">=" in dependency and "<" in dependency, dependency
