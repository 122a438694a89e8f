"""The page in a real browser: drawn, at rest and asked, and loaded again."""

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, DRIVER, browser
from PIL import Image
from run_folders import event, lines, row, write_run

from ulysses_jax.runs.page import page
from ulysses_jax.runs.read import read_runs

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    missing = [
        n for n, at in (("chromium", CHROMIUM), ("chromedriver", DRIVER)) if not at
    ]
    if missing:
        why = f"no {' and no '.join(missing)} here: apt-get install chromium-driver"
        assert "ULYSSES_NEEDS_CHROMIUM" not in os.environ, why
        pytest.skip(why)
    with browser(tmp_path_factory.mktemp("browser") / "profile") as found:
        yield found


@pytest.fixture
def shown(chromium):
    """The browser as it starts, with nothing said or asked before."""
    chromium.open("about:blank")
    chromium.look(1280, 900)
    chromium.said(), chromium.requested()
    return chromium


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Of two runs: one of 300 steps that was resumed, one of 2,500."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [
        row(
            n, 5 / n**0.2, gradient_norm=1 / n, unix_seconds=10.0 + n, counted_tokens=64
        )
        | ({"validation_loss": 5 / n**0.2 + 0.1} if n % 50 == 0 else {})
        for n in range(1, 301)
    ]
    events = [
        event(0.0, 0, "started", num_devices=8, device_kind="cpu"),
        event(160.0, 150, "started", num_devices=8, lost_steps=3, lost_seconds=3.0),
        event(260.0, 250, "spike", why="loss 9 is far above 4"),
        event(261.0, 250, "rolled_back", to_step=150, num_rows=1),
        event(310.0, 300, "done"),
    ]
    short = write_run(folder / "short", rows, events)
    long = [row(n, 6 / n**0.2) for n in range(1, 2501)]
    runs = read_runs([short, write_run(folder / "long", long)])
    made = folder / "runs.html"
    made.write_text(page(runs))
    return made


def points_of(shown, chart):
    lines = f"figure[data-chart={chart}] path.line"
    return shown.run(
        f"return [...document.querySelectorAll('{lines}')]"
        ".map(each => [each.dataset.run, Number(each.dataset.points)])"
    )


def shape_of(shown, chart="loss", run=0):
    line = f'figure[data-chart={chart}] path.line[data-run="{run}"]'
    return shown.run(f"return document.querySelector('{line}').getAttribute('d')")


def test_curves_are_drawn_of_every_point(shown, pages):
    shown.open(pages)
    assert points_of(shown, "loss") == [["0", 300], ["1", 834]]
    assert points_of(shown, "gradient_norm") == [["0", 300]]
    assert shape_of(shown).count("L") == 299
    count = "return document.querySelectorAll(arguments[0]).length"
    assert shown.run(count, "figure[data-chart=loss] circle.dot") == 6
    assert shown.run(count, "figure[data-chart=loss] path.band") == 1
    kinds = "return [...document.querySelectorAll('.mark')].map(m => m.dataset.kind)"
    assert shown.run(kinds) == ["resumed", "spike", "rolled_back"]
    signs = (
        "return [...document.querySelectorAll('.mark path')].map(each => "
        "each.getBoundingClientRect()).map(r => [r.left, r.right])"
    )
    _, (_, right), (left, _) = shown.run(signs)
    assert left > right
    assert shown.said() == []
    assert shown.requested() == [pages.as_uri()]


def test_every_line_lies_in_its_chart(shown, pages):
    shown.open(pages)
    outside = """
    return [...document.querySelectorAll('svg.chart')].flatMap(svg => {
      const [box, whole] = [svg.viewBox.baseVal, svg.getBoundingClientRect()];
      return [...svg.querySelectorAll('path.line, path.band, .dot, text, .mark')]
        .map(each => each.getBoundingClientRect())
        .filter(r => r.left < whole.left - 1 || r.right > whole.right + 12 ||
                     r.top < whole.top - 1 || r.bottom > whole.bottom + 1);
    }).length"""
    assert shown.run(outside) == 0


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_the_window_and_is_not_blank(shown, pages, width, dark):
    shown.look(width, 900, dark=dark)
    shown.open(pages)
    picture = Image.open(io.BytesIO(shown.picture())).convert("RGB")
    assert picture.width == width and picture.height > 900
    assert shown.run("return document.documentElement.scrollWidth") <= width
    pixels = np.asarray(picture).astype(int)
    paper = np.median(pixels.reshape(-1, 3), axis=0)
    assert (paper.max() < 60) if dark else (paper.min() > 230)
    # The first run's blue and the second's orange are on it, and much else is ink.
    red, green, blue = np.moveaxis(pixels, 2, 0)
    assert np.count_nonzero((blue - red > 100) & (blue > green)) > 1000
    assert np.count_nonzero((red - blue > 100) & (red > green)) > 1000
    assert 0.02 < np.mean(np.abs(pixels - paper).max(axis=2) > 60) < 0.5


def test_values_at_the_pointer(shown, pages):
    shown.open(pages)
    box = shown.run(
        "const r = document.querySelector('figure[data-chart=loss] svg')"
        ".getBoundingClientRect(); return [r.left, r.top, r.width, r.height]"
    )
    # The axis goes from step 1 to 2,500; the mark of the resume is at 150.
    at = box[0] + 58 + (box[2] - 72) * 149 / 2499
    shown.pointer(at, box[1] + box[3] / 2)
    tip = shown.wait("return document.querySelector('.tip:not([hidden])')?.innerText")
    loss = 5 / 150**0.2
    assert f"short, step 150: {loss:.4g}; validation at 150: {loss + 0.1:.4g}" in tip
    assert "step 150: resumed on 8; 3 steps are taken again (3.0 s)" in tip
    assert "long, step 148 to 150: 2.2" in tip
    place = "const r = document.querySelector('.tip').getBoundingClientRect();"
    left = shown.run(f"{place} return r.left")
    assert at < left < at + 40  # beside the pointer, not over what it shows
    shown.pointer(box[0] + box[2] - 15, box[1] + box[3] / 2)
    right = shown.wait(f"{place} return r.width && r.right")
    assert box[0] + box[2] - 60 < right < box[0] + box[2] - 15
    shown.pointer(5, 5)
    shown.wait("return !document.querySelector('.tip:not([hidden])')")


def test_what_is_chosen_is_drawn_and_kept(shown, pages):
    shown.open(pages)
    linear, grid = shape_of(shown), "return document.querySelectorAll('.grid').length"
    assert shown.run(grid) > 4
    shown.run("document.querySelector('figure[data-chart=loss] button').click()")
    assert shape_of(shown) != linear
    shown.run(
        "const s = document.getElementById('smooth'); s.value = 0;"
        "s.dispatchEvent(new Event('input'))"
    )
    # The norm goes down to a 300th: a linear scale would begin at 0.
    shown.run(
        "document.querySelector('figure[data-chart=gradient_norm] button').click()"
    )
    assert "NaN" not in shape_of(shown, "gradient_norm")
    assert shape_of(shown, "gradient_norm").count("L") == 299
    shown.run(
        "document.querySelector('figure[data-chart=gradient_norm] button').click()"
    )
    # A power of the step: on a logarithmic scale from 1 to 32 five times from 1 to 2.
    heights = [float(each.split(",")[1]) for each in shape_of(shown)[1:].split("L")]
    five = 5 * (heights[1] - heights[0])
    assert heights[31] - heights[0] == pytest.approx(five, abs=0.6)
    shown.run(
        "const x = document.getElementById('x'); x.value = 'tokens';"
        "x.dispatchEvent(new Event('change'))"
    )
    assert points_of(shown, "loss") == [["0", 300]]  # of the other none is known
    shown.run("document.querySelectorAll('#legend input')[1].click()")
    before = shape_of(shown)
    shown.run("location.reload()")
    shown.wait("return document.querySelectorAll('path.line').length")
    assert shape_of(shown) == before
    hash = shown.run("return location.hash")
    assert hash == "#x=tokens&smooth=0&log=loss&hidden=1"
    assert not shown.run("return document.querySelectorAll('#legend input')[1].checked")
    shown.run("document.querySelectorAll('#legend input')[0].click()")
    assert points_of(shown, "loss") == [] and shown.said() == []


def test_all_runs_are_smoothed_over_as_many_steps(shown, tmp_path):
    """The first 300 steps of a run are drawn as those of a run of 300 are, however
    much is smoothed: up to where the one of 300 has no steps after."""
    rows = [row(n, 2 + (n * 7919 % 100) / 100) for n in range(1, 901)]
    runs = [write_run(tmp_path / f"{n}", rows[:n]) for n in (300, 900)]
    made = tmp_path / "runs.html"
    made.write_text(page(read_runs(runs)))
    shown.open(f"{made.as_uri()}#smooth=10")
    short, long = (shape_of(shown, run=n).split("L") for n in (0, 1))
    assert short[:250] == long[:250] and short[299] != long[299]
    said = "return document.getElementById('window').textContent"
    assert shown.run(said) == "over 90 steps"


def test_no_script_runs_but_its_own_and_nothing_is_loaded(shown, tmp_path):
    """What users wrote is text; and were it not, the browser would refuse it."""
    evil = "</script><script>document.title = 'evil'<.script><img src=x>"
    events = [event(1.0, 0, "started", device_kind=evil), event(2.0, 1, evil, x=evil)]
    run = write_run(tmp_path / evil.replace("/", "."), [row(1)], events, act=evil)
    made = tmp_path / "runs.html"
    text = page(read_runs([run]))
    made.write_text(text)
    shown.open(made)
    assert points_of(shown, "loss") == [["0", 1]]
    assert shown.run("return document.title") != "evil"
    assert shown.run("return document.images.length") == 0
    assert (shown.said(), shown.requested()) == ([], [made.as_uri()])
    planted = "<script>document.title = 'evil'</script><img src='http://127.0.0.1:9/x'>"
    made.write_text(text.replace("</html>", f"{planted}</html>"))
    shown.open(made)
    assert shown.run("return document.title") != "evil"
    said = shown.said()
    assert len([each for each in said if "violates" in each]) == 2, said


def test_a_fault_of_the_script_is_seen(shown, pages, tmp_path):
    made = tmp_path / "runs.html"
    made.write_text(pages.read_text().replace('"along":', '"alongside":'))
    shown.open(f"{made.as_uri()}#x=tokens")
    assert any("TypeError" in each for each in shown.said())
    assert "could not draw the page" in shown.run("return document.body.innerText")


def test_a_page_that_is_open_follows_its_run(shown, tmp_path):
    """The program writes it again, the browser loads it again, and both end."""
    now = time.time()
    events = [event(now, 0, "started")]
    rows = [row(1, unix_seconds=now), row(2, unix_seconds=now)]
    run = write_run(tmp_path / "run", rows, events, is_at_work=True)
    made = tmp_path / "page.html"
    program = [
        sys.executable,
        "-m",
        "ulysses_jax.runs",
        str(run),
        "--output",
        str(made),
    ]
    following = subprocess.Popen(
        [*program, "--follow", "--seconds", "1"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert following.stdout is not None
    try:
        assert "written again while runs go on" in following.stdout.readline()
        shown.open(made)
        shown.run("document.querySelector('figure[data-chart=loss] button').click()")
        assert points_of(shown, "loss") == [["0", 2]]
        assert "refreshed every 1 s" in shown.run("return document.body.innerText")
        with open(run / "metrics.jsonl", "a") as file:
            file.write(lines([row(3, unix_seconds=time.time())]))
        three = "return document.querySelector('path.line')?.dataset.points == 3"
        shown.wait(three)
        assert shown.run("return location.hash").endswith("log=loss")
        with open(run / "events.jsonl", "a") as file:
            file.write(lines([event(time.time(), 3, "stopped")]))
        (run / "lock").unlink()
        assert following.wait(60) == 0
        shown.wait("return document.querySelector('#since')?.textContent == ''")
        shown.wait("return document.body.innerText.includes('stopped')")
        assert shown.said() == []
    finally:
        following.kill()
        following.communicate()
