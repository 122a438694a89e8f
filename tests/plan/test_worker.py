"""A compile in its own process: deaths and delays are messages, results are kept."""

import dataclasses
import sys

import pytest

from ulysses_jax import config as configs
from ulysses_jax.complete import complete
from ulysses_jax.costs.targets import TARGETS
from ulysses_jax.plan import compile as plan_compile
from ulysses_jax.plan.compile import PlanError
from ulysses_jax.plan.worker import plan_step

HEAD = "import sys, json; request = json.load(sys.stdin); "
ANSWERS = HEAD + "open(sys.argv[1], 'w').write(json.dumps({'result': {'n': 1}}))"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def plan(code, config=None, target=TARGETS["h100"], **options):
    config = config or tiny(seq=8)
    worker = (sys.executable, "-c", code)
    return plan_step(config, target, 1, 8, worker=worker, **options)


def tiny(**degrees):
    config = configs.Config(
        model=configs.Model(width=64, num_layers=1, num_heads=8, vocab_size=64),
        training=configs.Training(batch_size=8, sequence_tokens=64),
        mesh=configs.Mesh(**degrees),
    )
    return complete(config, name="tiny")


def test_an_abort_is_a_message():
    code = "import os, sys; sys.stderr.write('F0000 size mismatch\\n'); "
    code += "sys.stderr.flush(); os.abort()"
    with pytest.raises(PlanError, match=r"by signal 6.*\n.*size mismatch"):
        plan(code)


def test_a_compile_that_takes_too_long_is_a_message():
    with pytest.raises(PlanError, match="longer than 0.5 s"):
        plan("import time; time.sleep(60)", timeout_seconds=0.5)


def test_an_error_of_the_config_is_a_value_error():
    code = HEAD + "answer = {'error': 'use 4', 'is_plan_error': False}; "
    code += "open(sys.argv[1], 'w').write(json.dumps(answer))"
    with pytest.raises(ValueError, match="use 4") as caught:
        plan(code)
    assert not isinstance(caught.value, PlanError)


def test_a_mesh_that_does_not_match_says_one_that_does():
    with pytest.raises(ValueError, match="on h100:1x8.*data=2"):
        plan("raise SystemExit('not reached')", tiny(seq=4))


def test_results_are_kept_by_what_they_depend_on(own_cache):
    assert plan(ANSWERS) == {"n": 1, "is_cached": False}
    fails = "raise SystemExit('not reached')"
    assert plan(fails) == {"n": 1, "is_cached": True}
    config = tiny(seq=8)
    elsewhere = dataclasses.replace(config.run, folder="elsewhere")
    same = dataclasses.replace(config, run=elsewhere, quiet=True)
    assert plan(fails, same)["is_cached"]
    for changed in (
        dict(config=tiny(fsdp=2, seq=4)),
        dict(target=TARGETS["h200"]),
        dict(host_memory_bytes=10**12),
        dict(use_cache=False),
    ):
        with pytest.raises(PlanError, match="exit code 1.*\n.*not reached"):
            plan(fails, **changed)
    (file,) = own_cache.rglob("*.json")
    file.write_text("{ broken")
    assert plan(ANSWERS) == {"n": 1, "is_cached": False}


def test_without_the_plugin_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(plan_compile, "_is_installed", lambda _: False)
    with pytest.raises(PlanError, match="pip install 'ulysses-jax"):
        plan_compile.compile_step(tiny(seq=8), TARGETS["h100"], 1, 8)
