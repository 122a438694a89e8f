"""The check of a GPU, on the CPU: rows, faults that it must see, processes that die."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from itertools import product

import jax
import numpy as np
import pytest

from ulysses_jax.attention.exact import exact_attention
from ulysses_jax.attention.mosaic import BLOCK_STEP, BLOCK_TOKENS
from ulysses_jax.attention.reference import dense_mask
from ulysses_jax.check_gpu import __main__ as command
from ulysses_jax.check_gpu import errors, steps, timings
from ulysses_jax.check_gpu.measure import UNTIL, NoMachine, measure
from ulysses_jax.check_gpu.problems import MASKS, Heads, both_ways, kernels, sinks
from ulysses_jax.check_gpu.rows import QUICK, Sizes, Skip
from ulysses_jax.check_gpu.tables import BEGIN, END, markdown, page_with
from ulysses_jax.check_gpu.worker import run
from ulysses_jax.mesh import Device
from ulysses_jax.plan.check import bytes_row
from ulysses_jax.plan.compile import PlanError

# Two masks, and an attention whose scale is 4 % off at head size 16.
FAULTY = """
from functools import partial
from ulysses_jax.check_gpu import errors, problems, timings, worker

for name in set(problems.MASKS) - {"causal", "packed window", "sinks", "block-sparse"}:
    del problems.MASKS[name]
timings.TIMED_MASKS = ("causal",)
errors.SPOT_MASKS = ("causal", "block-sparse")
right = problems.ATTENTIONS["blockwise"]
problems.ATTENTIONS["blockwise"] = partial(right, scale=0.26)
worker.main()
"""


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def of(results, table, **columns):
    return [
        row
        for row in results["rows"]
        if row["table"] == table and columns.items() <= row.items()
    ]


def test_a_wrong_scale_fails_and_the_rest_is_measured(tmp_path, monkeypatch, capsys):
    file = tmp_path / "measured.json"
    worker = (sys.executable, "-c", FAULTY)
    monkeypatch.setattr(
        command, "measure", lambda **options: measure(worker=worker, **options)
    )
    tables = "errors,spots,rates,timings"
    code = command.main(["--json", str(file), "--tables", tables, "--minutes", "30"])
    assert code == 1
    results = json.loads(file.read_text())
    assert results["is_complete"] and results["quick"]
    assert results["machine"]["card"] == "cpu"
    assert results["machine"]["versions"]["jax"]
    assert {row["table"] for row in results["rows"]} == set(tables.split(","))
    for dtype, most in (("bfloat16", 0.008), ("float16", 0.001)):
        (sinks,) = of(results, "errors", kernel="blockwise", mask="sinks", dtype=dtype)
        assert sinks["status"] == "ok" and 0 < sinks["dsinks"] < most
    for none in of(results, "errors", kernel="jax.nn xla", mask="sinks"):
        assert none["status"] == "skipped" and none["why"] == "it has no sinks"
    for sparse in of(results, "errors", kernel="blockwise", mask="block-sparse"):
        assert sparse["status"] == "FAIL" and sparse["tokens"] == 192
    for none in of(results, "errors", kernel="jax.nn xla", mask="block-sparse"):
        assert none["status"] == "skipped" and "a layout of blocks" in none["why"]
    wrong = [
        row
        for row in of(results, "errors", kernel="blockwise")
        if row["mask"] != "sinks"  # which goes by another function
    ]
    assert [row["status"] for row in wrong] == ["FAIL"] * 8
    for row in wrong:
        assert row["why"].startswith("out 0.0") and row["dq"] > 0.008
    right = of(results, "errors", kernel="jax.nn xla", mask="causal")
    assert [row["status"] for row in right] == ["ok"] * 2 + ["skipped"]
    for name in ("out", "dq", "dk", "dv"):
        assert 0 < right[0][name] < 0.005
    for name in ("mosaic", "cudnn"):
        for row in of(results, "errors", kernel=name):
            assert row["status"] == "skipped" and "needs" in row["why"]
    for mask in ("causal", "block-sparse"):
        (wrong,) = of(results, "spots", kernel="blockwise", mask=mask)
        assert wrong["status"] == "FAIL" and wrong["dv"] > 0.005
    assert of(results, "spots", kernel="jax.nn xla")[0]["status"] == "ok"
    assert of(results, "rates")[0]["TFLOP/s"] > 0
    both = of(results, "timings", kernel="blockwise")
    assert [row["pass"] for row in both] == ["forward", "forward and backward"]
    for row in both:
        flops = 2 * row["tokens"] * (row["tokens"] + 1) / 2 * 4 * 16
        flops *= 2 if row["pass"] == "forward" else 7
        assert row["TFLOP/s"] * 1e12 * row["ms"] / 1e3 == pytest.approx(flops)
    out, err = capsys.readouterr()
    assert "**10 rows FAIL.**" in out and "mosaic, 10 rows skipped: it needs" in out
    assert "FAIL errors blockwise causal" in err


def test_a_step_beside_a_wrong_plan_fails(tmp_path, monkeypatch, capsys):
    """A GPU that held a fifth more than planned: both figures, and exit code 1."""

    def check(config, *, num_steps):
        rows = [
            bytes_row("state and batch on a device", 5_000_000, 5_000_000),
            bytes_row("high-water mark of a device", 8_000_000, 9_600_000),
            dict(what="a step", planned=1.0, measured=3.0, unit="seconds"),
        ]
        plan = {"attention": [], "compile_seconds": 1.0}
        return {"rows": rows, "plan": plan}

    monkeypatch.setattr(steps, "check", check)
    rows, said = steps.step_rows(QUICK)[:1], []
    request = {"done": [], "tables": ["steps"], "until": {"steps": math.inf}}
    assert run(rows, request, said.append)
    (_, result) = said
    machine = dict(card="none", versions={}, driver=None, python="3")
    results = {
        "rows": [
            dict(table="rates", product="8^3", status="ok"),
            dict(table="steps", **rows[0].name, **result),
        ],
        "machine": machine,
        "started": "2026-01-01",
        "quick": False,
    }
    monkeypatch.setattr(command, "measure", lambda **options: results)
    assert command.main(["--json", str(tmp_path / "measured.json")]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "(" in line]
    assert "high-water mark of a device (MB) | 8.000 | 9.600 | 1.200 |" in lines[1]
    assert [line.split(" | ")[-1] for line in lines] == [
        "ok |",
        "**FAIL** high-water mark of a device: planned 8,000,000 bytes, measured "
        "9,600,000, more than 10% apart |",
        "ok |",
    ]


CPU, GPU = Device("cpu", "cpu"), Device("gpu", "none")


def test_float64_of_a_device_is_numpys():
    """Which the check takes on a GPU: rows of documents, and sinks."""
    problem = MASKS["packed"](2, 24, 10)._replace(has_sinks=True)
    asked = errors._Asked(problem, 2, 24, Heads(4, 2, 8), "float16")
    found, numpys = errors._exact(asked, GPU), errors._exact(asked, CPU)
    for a, b in zip(found, numpys, strict=True):
        assert a.dtype == b.dtype == np.float64
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", ["packed window", "sinks", "block-sparse"])
def test_float64_of_spots_is_that_of_all(mask):
    spots = 0, 63, 64, 200, 319
    problem = MASKS[mask](1, 320, 100)
    some = errors._Asked(problem, 1, 320, Heads(2, 1, 8), "bfloat16", spots)
    inputs = some.inputs()
    seen = np.asarray(dense_mask(problem.mask, 320, 320)[:, 0])
    its_sinks = sinks(2) if problem.has_sinks else None
    want = exact_attention(*map(np.asarray, inputs), seen, sinks=its_sinks)
    at = list(spots)
    want = want[0][:, at], want[1][:, at], *want[2:]
    for a, b in zip(errors._exact(some, CPU), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def test_every_kernel_under_every_mask_has_a_row():
    beside = kernels(CPU)
    rows = errors.error_rows(CPU, beside, QUICK)
    found = [
        tuple(row.name[x] for x in ("kernel", "mask", "dtype", "heads")) for row in rows
    ]
    want = {
        *product(beside, MASKS, ("bfloat16", "float16"), ("4/2",)),
        *product(beside, ("causal", "packed window"), ("bfloat16",), ("2/2",)),
    }
    assert set(found) == want and len(found) == len(want)
    spots = errors.spot_rows(CPU, beside, QUICK)
    masks = set(MASKS) - {"packed window", "full"}
    want = set(product(beside, masks))
    assert {(row.name["kernel"], row.name["mask"]) for row in spots} == want


@pytest.fixture(scope="module")
def judged():
    """`f(**got)`: the status where a kernel gives this, and else float64's."""
    asked = errors._Asked(MASKS["sinks"](1, 16, 8), 1, 16, Heads(2, 1, 8), "float16")
    exact = dict(zip(errors.NAMES, errors._exact(asked, CPU), strict=True))

    def status(**got):
        results = tuple((exact | got).values())
        row = errors._judge(asked, lambda: tuple(exact.values()), lambda *_: results)
        return row.get("status")

    return exact, status


@pytest.mark.parametrize("name", errors.NAMES)
def test_each_result_is_held_to_its_tolerance(judged, name):
    """A NaN is beyond any."""
    exact, status = judged
    most = errors.TOLERANCES["float16"][name]
    assert status(**{name: exact[name] * (1 + 0.9 * most)}) is None
    assert status(**{name: exact[name] * (1 + 1.1 * most)}) == "FAIL"
    got = exact[name].copy()
    got.flat[1] = np.nan
    assert status(**{name: got}) == "FAIL"


def test_a_kernel_that_is_true_passes():
    problem = MASKS["sinks"](1, 16, 8)
    asked = errors._Asked(problem, 1, 16, Heads(2, 1, 8), "float16")
    program = jax.jit(both_ways(kernels(CPU)["blockwise"], problem))
    row = errors._judge(asked, lambda: errors._exact(asked, CPU), program)
    assert list(row) == list(errors.NAMES) and all(row.values())


def test_tolerances_are_below_a_scale_that_is_off_by_some_per_cent():
    for dtype, rounding in (("bfloat16", 2**-9), ("float16", 2**-12)):
        for most in errors.TOLERANCES[dtype].values():
            assert rounding < most < 0.01


def test_a_gradient_of_queries_that_have_none_fails():
    spots = 3, 9
    problem = MASKS["causal"](1, 16, 8)
    asked = errors._Asked(problem, 1, 16, Heads(1, 1, 8), "float16", spots)
    exact = errors._exact(asked, CPU)
    out, dq = (np.zeros((1, 16, 1, 8)) for _ in range(2))
    for whole, some in zip((out, dq), exact, strict=False):
        whole[:, spots] = some
    for wrong, status in ((0.0, None), (1e-3, "FAIL"), (np.nan, "FAIL")):
        dq[0, 5] = wrong
        got = out, dq, *exact[2:]
        row = errors._judge(asked, lambda: exact, lambda *_, got=got: got)
        assert row.get("status") == status


def test_seconds_are_of_one_call_that_has_ended(monkeypatch):
    """By a clock that goes on where a result is waited for, in each round otherwise."""
    now, started = 0.0, 0
    # The calls that do not count, 6 of which take 20 ms; five rounds.
    each = iter((9, 0.003, 0.001, 0.003, 0.009, 0.003, 0.002))

    def call():
        nonlocal started
        started += 1

    def wait(_):
        nonlocal now, started
        now, started = now + started * next(each), 0

    monkeypatch.setattr(timings.time, "perf_counter", lambda: now)
    monkeypatch.setattr(timings.jax, "block_until_ready", wait)
    assert timings.seconds_of(call) == pytest.approx(0.003)
    assert not list(each)


def test_rates_are_of_the_products_of_visible_pairs(monkeypatch):
    def num_results(function, mask, like):
        return len(jax.tree.leaves(jax.eval_shape(function, mask, *like)))

    monkeypatch.setattr(timings, "compiled", num_results)
    monkeypatch.setattr(timings, "seconds_of", lambda call: 2.0)
    (row,) = timings.rate_rows(QUICK)
    assert row.measure(None) == {"ms": 2000, "TFLOP/s": 2 * 256**3 / 2 / 1e12}
    sizes = dataclasses.replace(QUICK, timed_tokens=(256, 512), longest_call_seconds=7)
    named = {
        tuple(row.name[x] for x in ("tokens", "pass")): row
        for row in timings.timing_rows(CPU, kernels(CPU), sizes)
        if (row.name["kernel"], row.name["mask"]) == ("blockwise", "window")
    }
    pairs = 64 * 65 // 2 + (256 - 64) * 64
    for name, products, results in (
        ("forward", 2, 1),
        ("forward and backward", 7, 4),
    ):
        (row, longer) = (named[tokens, name] for tokens in (256, 512))
        assert row.prepare() == results
        rate = products * 2 * pairs * 4 * 16 / 2 / 1e12
        assert row.measure(None) == {"ms": 2000, "TFLOP/s": pytest.approx(rate)}
        assert longer.measure(None)["ms"] == 2000  # 4.3 s were expected
    monkeypatch.setattr(timings, "seconds_of", lambda call: 4.0)
    named[256, "forward"].measure(None)
    with pytest.raises(Skip, match="would take some 9 s"):
        named[512, "forward"].measure(None)


def test_the_share_of_the_rate_that_was_measured():
    rows = [
        {"table": "rates", "product": "8^3", "ms": 1.0, "TFLOP/s": 800.0},
        {"table": "timings", "kernel": "mosaic", "ms": 1.0, "TFLOP/s": 200.0},
    ]
    rows = [row | {"status": "ok"} for row in rows]
    machine = dict(card="none", versions={}, driver=None, python="3")
    results = dict(rows=rows, machine=machine, started="2026-01-01", quick=False)
    assert "| mosaic | 1 | 200 | 25% | ok |" in markdown(results)


@pytest.mark.parametrize(
    "error, status", [(PlanError("no plan"), "FAIL"), (ValueError("none"), "skipped")]
)
def test_a_step_without_a_kernel_is_skipped_and_without_a_plan_fails(
    monkeypatch, error, status
):
    def check(config, *, num_steps):
        raise error

    monkeypatch.setattr(steps, "check", check)
    rows, said = steps.step_rows(QUICK)[:1], []
    run(
        rows,
        {"done": [], "tables": ["steps"], "until": {"steps": math.inf}},
        said.append,
    )
    assert said[1]["status"] == status and str(error) in said[1]["why"]


def test_shapes_have_several_tiles_and_a_part_of_one():
    tokens = Sizes().error_tokens
    assert tokens > 2 * BLOCK_TOKENS and tokens % BLOCK_STEP
    assert Sizes().spot_tokens % BLOCK_TOKENS == 0
    spots = errors._spots(Sizes().spot_tokens, Sizes().spot_span)
    assert {511, 512, BLOCK_TOKENS - 1, BLOCK_TOKENS} < set(spots)
    assert len(spots) == errors.NUM_SPOTS


@pytest.mark.slow
def test_the_command_runs_to_its_end(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "ulysses_jax.check_gpu", "--minutes", "60"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(command.PAGE.parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "measured.json").read_text())
    assert {row["table"] for row in results["rows"]} == set(UNTIL)
    assert {row["status"] for row in results["rows"]} == {"ok", "skipped"}
    for row in of(results, "errors", kernel="blockwise"):
        assert row["status"] == "ok"
    steps = of(results, "steps")
    assert [row["status"] for row in steps] == ["ok"] * 2
    for row in steps:
        held = row["rows"][0]
        assert held["planned"] == held["measured"] > 0
        assert row["rows"][2]["measured"] > 0
    assert "| of 64 tokens on average | a step (s) |" in done.stdout


@pytest.mark.parametrize("mask", MASKS)
def test_pairs_are_those_that_a_mask_shows(mask):
    cases = ((40, 12), (36, 12), (10, 12))
    for tokens, span in ((128, 12), (320, 12)) if mask == "block-sparse" else cases:
        problem = MASKS[mask](2, tokens, span)
        seen = np.asarray(dense_mask(problem.mask, tokens, tokens)[:, 0])
        assert problem.pairs == np.broadcast_to(seen, (2, tokens, tokens)).sum()


# A worker without JAX: rows a, b, c; `at_b` is what happens where b begins.
STAND_IN = """
import json, os, signal, sys, time
request = json.load(sys.stdin)
def say(**message):
    print(json.dumps(message), flush=True)
machine = dict(card="none", versions={{}}, driver=None, python="3")
rows = [dict(table="errors", kernel=name) for name in "abc"]
say(machine=machine, quick=False, rows=rows)
for i in range(3):
    if i not in request["done"]:
        say(begin=i)
        if i == 1:
            {at_b}
        say(row=i, status="ok")
"""


@pytest.mark.parametrize(
    "at_b, why",
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "ended by signal 11"),
        ("sys.exit('no such kernel')", "ended with exit code 1: no such kernel"),
        ("time.sleep(60)", "nothing was heard of it for 3 s"),
    ],
)
def test_a_process_that_dies_or_hangs_costs_one_row(at_b, why):
    kept = []
    results = measure(
        tables=("errors",),
        keep=lambda results, i: kept.append(i),
        worker=(sys.executable, "-c", STAND_IN.format(at_b=at_b)),
        silence_seconds=3,
    )
    assert [row["status"] for row in results["rows"]] == ["ok", "FAIL", "ok"]
    assert why in results["rows"][1]["why"]
    assert kept == [0, 1, 2, None]
    assert "**1 rows FAIL.**" in markdown(results)


def test_what_time_does_not_allow_is_skipped_and_said():
    results = measure(
        tables=("errors",),
        minutes=1e-6,
        keep=lambda results, i: None,
        worker=(sys.executable, "-c", STAND_IN.format(at_b="time.sleep(60)")),
        silence_seconds=3,
    )
    rows = results["rows"]
    assert [row["status"] for row in rows] == ["ok", "skipped", "skipped"]
    assert "--minutes 1e-06" in rows[1]["why"] and "--minutes 1e-06" in rows[2]["why"]


def test_a_machine_that_cannot_start():
    worker = (sys.executable, "-c", "raise SystemExit('no devices')")
    with pytest.raises(NoMachine, match="exit code 1: no devices"):
        measure(keep=lambda results, i: None, worker=worker)


def test_the_page_takes_the_tables(tmp_path):
    page = tmp_path / "measured.md"
    page.write_text(f"# Title\n\n{BEGIN}\nNothing yet.\n{END}\n\nEnd.\n")
    text = page_with(page, "| a |")
    assert text == f"# Title\n\n{BEGIN}\n\n| a |\n\n{END}\n\nEnd.\n"
    page.write_text(text)
    assert page_with(page, "| a |") == text
    page.write_text("# Title\n")
    with pytest.raises(ValueError, match="has not the lines"):
        page_with(page, "")
    assert page_with(command.PAGE, "x")


@pytest.mark.parametrize("quick", [True, False])
def test_tiny_shapes_leave_the_page_as_it_is(quick, tmp_path, monkeypatch):
    page = tmp_path / "measured.md"
    page.write_text(f"{BEGIN}\nMeasured.\n{END}\n")
    machine = dict(card="a card", versions={}, driver=None, python="3")
    results = dict(rows=[], machine=machine, started="2026-01-01", quick=quick)
    monkeypatch.setattr(command, "PAGE", page)
    monkeypatch.setattr(command, "measure", lambda **options: results)
    json_at = str(tmp_path / "measured.json")
    assert command.main(["--write-docs", "--json", json_at]) == 0
    assert ("Measured." in page.read_text()) == quick
    assert ("a card" in page.read_text()) != quick


@pytest.mark.parametrize(
    "argument, message",
    [(("--tables", "errors,speed"), "speed"), (("--minutes", "0"), "positive")],
)
def test_refusals(argument, message, capsys, tmp_path):
    file = tmp_path / "measured.json"
    assert command.main(["--json", str(file), *argument]) == 2
    assert message in capsys.readouterr().err and not file.exists()
