"""The page as text: all that there is is in it, and nothing in it becomes more."""

import json
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from files import ROOT
from run_folders import event, lines, row, write_run

from ulysses_jax.runs import page as page_module
from ulysses_jax.runs.__main__ import main
from ulysses_jax.runs.curves import MOST_POINTS, curve
from ulysses_jax.runs.events import lost_saves
from ulysses_jax.runs.goodput import Goodput
from ulysses_jax.runs.page import page
from ulysses_jax.runs.read import columns_of, read_runs

EVIL = "</script><script>alert(1)</script><b onclick='x'>&amp;\"'"


class Elements(HTMLParser):
    """Elements, and text by the heading that it stands under."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.words, self._in, self._under = [], {}, [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._in.append(tag)

    def handle_data(self, data):
        if self._in and self._in[-1] == "h2":
            self._under = data
        self.words.setdefault(self._under, []).append(data)

    def count(self, tag):
        return sum(tag == each for each, _ in self.elements)


def data_of(text):
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)<', text)
    return json.loads(found)


def page_of(*folders, **how):
    return page(read_runs(folders), **how)


def words_of(text):
    return " ".join(" ".join(each) for each in Elements(text).words.values())


def table_of(text, heading):
    """Rows of cells of the first table under a heading."""
    part = text.split(f"<h2>{heading}</h2>")[1].split("</table>")[0]
    return [
        [
            re.sub("<[^>]*>", "", cell).strip()
            for cell in re.split("</t[dh]>", each)[:-1]
        ]
        for each in part.split("</tr>")[:-1]
    ]


def test_what_users_wrote_is_text_alone(tmp_path):
    plain = write_run(tmp_path / "plain", [row(1)], [event(1.0, 0, "started")])
    evil = EVIL.replace("/", ".")  # no folder's name has a slash
    events = [
        event(1.0, 0, "started", device_kind=EVIL, num_devices=1),
        event(2.0, 1, "skipped", why=EVIL, rows=[EVIL] * 20),
        event(2.0, 1, EVIL, **{EVIL: EVIL}),
        event(3.0, 1, "failed", why=EVIL),
    ]
    run = write_run(tmp_path / evil, [row(1)], events, activation=EVIL, **{EVIL: 1})
    text, harmless = page_of(plain, run), page_of(plain)
    assert text.count("alert(1)") >= 8
    found = Elements(text)
    assert found.count("script") == Elements(harmless).count("script") == 2
    for tag, attributes in found.elements:
        assert tag != "b" and not any(name.startswith("on") for name in attributes)
    assert data_of(text)["runs"][1]["name"] == evil
    assert data_of(text)["runs"][1]["marks"][0]["text"].startswith(f"skipped: {EVIL}")
    words = " ".join(word for each in found.words.values() for word in each)
    assert f"failed: {EVIL}" in words


def test_names_of_any_bytes(tmp_path):
    text = page_of(write_run(tmp_path / "caf\udce9", [row(1)]))
    assert "caf\\udce9" in text and text.encode()


def test_nothing_is_asked_of_a_network(tmp_path):
    run = write_run(tmp_path / "run", [row(1)], [event(1.0, 0, "started")])
    text = page_of(run, refresh_seconds=5)
    for _, attributes in Elements(text).elements:
        assert not {"src", "href", "srcset", "action"} & set(attributes)
    assert "@import" not in text and "url(" not in text and "fetch(" not in text
    assert "default-src 'none'" in text


def test_numbers_that_are_none_are_no_json_of_ours(tmp_path):
    rows = [row(1), row(2, float("nan")), row(3, float("inf")), row(4, 1.0)]
    data = data_of(page_of(write_run(tmp_path / "run", rows)))
    found = data["runs"][0]["curves"]["loss"]
    assert (found["steps"], found["mean"]) == ([1, 4], [2.0, 1.0])


@pytest.mark.parametrize("seconds", [1.7e308, -5.0])
@pytest.mark.parametrize("part", ["other", "checkpoint", "data"])
def test_times_that_are_none_break_no_page(tmp_path, part, seconds):
    rows = [row(n, unix_seconds=1.0 + n, other_seconds=0.5) for n in (1, 2)]
    for each in rows:
        each[f"{part}_seconds"] = seconds
    events = [event(0.0, 0, "started"), event(4.0, 2, "done")]
    text = page_of(write_run(tmp_path / "run", rows, events))
    assert "<h2>Where the time went</h2>" in text and "nan" not in text


def test_a_curve_of_few_rows_is_all_of_them():
    columns = columns_of([row(n, n / 2) for n in range(1, MOST_POINTS + 1)])
    found = curve(columns, "loss")
    assert found is not None and found["mean"] == (columns["step"] / 2).tolist()
    assert "least" not in found and curve(columns, "objective") is None


def test_a_curve_of_many_rows_keeps_the_least_and_the_greatest():
    """A spike of one step in 100,000 is seen, and the mean is that of all rows."""
    steps = np.arange(1.0, 100_001)
    loss = 2 + np.sin(steps)
    loss[[54_321, 77_777]] = 40.0, -3.0
    loss[10_000:10_250] = np.nan
    found = curve({"step": steps, "loss": loss}, "loss")
    assert found is not None
    assert len(found["steps"]) <= MOST_POINTS and found["rows"] == 100
    assert found["steps"][0] == 100 and found["steps"][-1] == 100_000
    assert max(found["greatest"]) == 40.0 and min(found["least"]) == -3.0
    at = found["greatest"].index(40.0)
    assert found["steps"][at - 1] < 54_322 <= found["steps"][at]
    inside = loss[(steps > found["steps"][at - 1]) & (steps <= found["steps"][at])]
    assert found["mean"][at] == pytest.approx(inside.mean(), rel=1e-5)


def test_validation_is_a_point_of_its_own_rows():
    rows = [
        row(n) | ({"validation_loss": 3.0} if n == 5000 else {}) for n in range(1, 9000)
    ]
    found = curve(columns_of(rows), "validation_loss")
    assert found == {"rows": 1, "steps": [5000], "mean": [3.0]}


def test_a_page_is_of_bounded_size(tmp_path):
    """Ten times as many rows and events: hardly more bytes."""

    def size(factor):
        rows = [
            row(
                n, 1 / n, gradient_norm=n / 7, validation_loss=2.0, unix_seconds=9.0 + n
            )
            for n in range(1, 3000 * factor)
        ]
        events = [event(0.0, 0, "started")]
        events += [
            event(9.5 + n, n, "skipped", why="nan", rows=list(range(999)))
            for n in range(1, 300 * factor)
        ]
        run = write_run(tmp_path / f"run_{factor}", rows, events)
        return len(page_of(run))

    assert size(10) < 1.1 * size(1) < 600_000


def test_it_says_that_a_point_is_of_many_steps(tmp_path):
    run = write_run(tmp_path / "run", [row(n) for n in range(1, 2501)])
    assert "Steps a point: run 3." in page_of(run)
    assert "Steps a point" not in page_of(write_run(tmp_path / "few", [row(1)]))


def test_results(tmp_path):
    rows = [
        row(
            n,
            9 - n,
            tokens_per_second=100 * n,
            counted_tokens=10,
            mfu=0.4,
            device_peak_bytes=3 * 2**29,
            unix_seconds=2.0 + n,
        )
        for n in range(1, 6)
    ]
    rows[2]["validation_loss"], rows[4]["validation_loss"] = 3.5, 3.75
    events = [
        event(0.0, 0, "started", num_devices=8, device_kind="H100"),
        event(8.0, 5, "done"),
    ]
    old = write_run(tmp_path / "old", [row(1, 7.0)])
    text = page_of(write_run(tmp_path / "new", rows, events, num_steps=5), old)
    found = {name: values for name, *values in table_of(text, "Results")}
    assert found == {
        "": ["new", "old"],
        "state": ["done", "ended before its last step"],
        "steps": ["5 of 5", "1 of 100"],
        "last loss": ["4.0000", "7.0000"],
        "mean loss of the last 1 steps": ["4.0000", "7.0000"],
        "best validation loss": ["3.5000 at step 3", "none"],
        "tokens a second, median": ["300", "not known"],
        "seconds a step, median": ["1", "1"],
        "MFU, median": ["40.0%", "not known"],
        "memory of a device at its peak": ["1.5 GiB", "not known"],
        "tokens that counted": ["50", "not known"],
        "steps skipped": ["0", "not known"],
        "spikes": ["0", "not known"],
        "time of steps": ["5.0 s", "1.0 s"],
        "time in all": ["8.0 s", "not known"],
        "goodput": ["62.5%", "not known"],
        "devices": ["8 H100", "not known"],
    }
    times = {name: values for name, *values in table_of(text, "Where the time went")}
    assert times["useful: steps that count, each once"] == ["5.0 s (62.5%)"]
    assert times["in all"] == ["8.0 s"]
    assert "Not known of old: no events.jsonl says when it was started." in words_of(
        text
    )
    assert "old has no events.jsonl: when it was stopped" in words_of(text)


def test_config_fields_that_differ(tmp_path):
    one = write_run(tmp_path / "one", [row(1)], width=32, window=None)
    two = write_run(tmp_path / "two", [row(1)], width=64, sinks=True, window=None)
    assert table_of(page_of(one, two), "What differs in the configs") == [
        ["", "one", "two"],
        ["model.width", "32", "64"],
        ["model.sinks", "(no such field)", "true"],
    ]
    same = write_run(tmp_path / "same", [row(1)], width=32, window=None)
    started = {"profile": [3, 4], "quiet": True, "distributed": {"process_id": 1}}
    config = yaml.safe_load((same / "config.yaml").read_text()) | started
    config["run"]["wandb"] = True
    (same / "config.yaml").write_text(yaml.safe_dump(config))
    assert "They are the same, but for folders and what is of" in page_of(one, same)
    assert "Configs" not in Elements(page_of(one)).words


def test_lengths(tmp_path):
    rows = [
        row(n, sequence_tokens=64 * (1 + n % 2), seconds=1.0 + n % 2)
        for n in range(1, 7)
    ]
    found = table_of(page_of(write_run(tmp_path / "run", rows)), "Lengths")
    assert [each[:4] for each in found[1:]] == [
        ["64", "3 (50%)", "33%", "1"],
        ["128", "3 (50%)", "67%", "2"],
    ]


def test_events_in_words(tmp_path):
    events = [
        event(0.0, 0, "started", num_devices=8, num_processes=2, device_kind="H100"),
        event(5.0, 0, "compiled", seconds=4.0, sequence_tokens=2048),
        event(9.0, 4, "saved", seconds=0.5, bytes=99),
        event(9.5, 4, "committed", seconds=3.0, bytes=100),
        event(9.6, 6, "saved", seconds=0.5, bytes=99),
        event(10.0, 7, "skipped", why="loss is nan", num_rows=2),
        event(10.0, 7, "rows", of="skipped", rows=[5, 9]),
        event(10.5, 8, "unheard_of", numbers=list(range(20))),
        event(11.0, 9, "spike", why="loss 8.25 is far above 3"),
        event(11.5, 9, "rolled_back", to_step=4, num_rows=2),
        event(11.7, 9, "profiled", folder="runs/x/profile"),
        event(11.8, 9, "not_finite", loss="nan", gradient_norm=0.5, num_rows=1),
        event(12.0, 9, "told", signal="SIGTERM"),
        event(13.0, 9, "stopped", device_peak_bytes=[2**30, 2**31]),
        event(
            99.0,
            4,
            "started",
            num_devices=4,
            num_processes=1,
            device_kind="H100",
            lost_steps=5,
            lost_seconds=50.0,
        ),
        event(120.0, 8, "failed", why="the disk is full"),
    ]
    text = page_of(write_run(tmp_path / "run", [row(n) for n in range(1, 9)], events))
    assert [each[2:] for each in table_of(text, "Events")[1:]] == [
        ["0", "started on 8 H100, 2 processes"],
        ["0", "compiled the step for rows of 2,048 tokens in 4.0 s"],
        ["6", "a checkpoint was begun, and never whole on disk"],
        ["7", "skipped: loss is nan; num_rows 2"],
        ["8", "unheard of; numbers [0, 1, 2, 3, 4, 5, 6, 7, ... 20 in all]"],
        ["9", "spike: loss 8.25 is far above 3"],
        ["9", "rolled back to step 4; num_rows 2"],
        ["9", "profiled: runs/x/profile"],
        ["9", "not finite; loss nan; gradient_norm 0.5; num_rows 1"],
        ["9", "told: SIGTERM"],
        ["9", "stopped; devices held at most 1.0 GiB to 2.0 GiB"],
        ["4", "resumed on 4 H100; 5 steps are taken again (50.0 s)"],
        ["8", "failed: the disk is full"],
    ]
    said = (
        "checkpoints that run began: 2, the last at step 6; whole on disk: 1, after 3.0"
    )
    assert said in words_of(text)
    marks = [(each["kind"], each["step"]) for each in data_of(text)["runs"][0]["marks"]]
    assert marks == [("skipped", 7), ("spike", 9), ("rolled_back", 9), ("resumed", 4)]


def lost_saves_of(tmp_path, events, **how):
    (run,) = read_runs([write_run(tmp_path / "run", [row(9)], events, **how)])
    return [(each["step"], each["unix_seconds"]) for each in lost_saves(run)]


def saved(at, step):
    return event(at, step, "saved", seconds=0.1, bytes=9)


def test_saves_that_were_lost(tmp_path):
    """Killed in its second save, a run makes it again; one is known to be whole since
    the run goes on from there; the last is lost where the run has ended."""
    now = time.time()
    events = [
        event(now, 0, "started"),
        saved(now + 1, 2),
        event(now + 2, 2, "committed", seconds=1.0, bytes=9),
        saved(now + 3, 4),
        event(now + 4, 2, "started"),
        saved(now + 5, 4),
        event(now + 6, 4, "committed", seconds=1.0, bytes=9),
        saved(now + 7, 6),
        event(now + 8, 6, "started"),
        saved(now + 9, 8),
    ]
    lost = [(4, now + 3), (8, now + 9)]
    assert lost_saves_of(tmp_path, events) == lost
    assert lost_saves_of(tmp_path, events, is_at_work=True) == lost[:1]


def test_of_older_runs_nothing_says_that_a_save_was_lost(tmp_path):
    events = [event(1.0, 0, "started"), event(2.0, 2, "saved", seconds=1.0)]
    assert lost_saves_of(tmp_path, events) == []


def test_means_at_the_end_are_of_as_many_steps_in_all_runs(tmp_path):
    long = write_run(tmp_path / "long", [row(n, n) for n in range(1, 301)])
    short = write_run(tmp_path / "short", [row(n, n) for n in range(1, 31)])
    found = {name: of for name, *of in table_of(page_of(long, short), "Results")}
    assert found["mean loss of the last 10 steps"] == ["295.5000", "25.5000"]


def lab(colour):
    """CIELAB of #rrggbb."""
    sent = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    linear = np.where(sent <= 0.04045, sent / 12.92, ((sent + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722]]
    to_xyz = np.array([*to_xyz, [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ linear / [0.95047, 1.0, 1.08883])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("is_dark", [False, True])
def test_no_part_of_the_time_has_a_run_s_colour(is_dark):
    css = (Path(page_module.__file__).parent / "page.css").read_text()
    light, dark = css.split("@media screen and (prefers-color-scheme: dark)")
    named = dict(re.findall(r"--([\w-]+): (#\w{6})", light + (dark if is_dark else "")))
    runs = [lab(named[f"run-{n}"]) for n in range(7)]
    parts = [lab(named[name]) for name in Goodput().parts()]
    for at, part in enumerate(parts):
        for other in [*runs, *parts[:at], lab(named["paper"])]:
            assert np.linalg.norm(part - other) > 15


# ---- The program.


def test_the_program_writes_a_page_and_says_where(tmp_path, capsys, monkeypatch):
    write_run(tmp_path / "run", [row(1)], is_at_work=True)
    monkeypatch.chdir(tmp_path)
    main(["run"])
    out = capsys.readouterr().out
    assert out == f"{(tmp_path / 'runs.html').as_uri()}\n"
    text = (tmp_path / "runs.html").read_text()
    assert (
        data_of(text)["refresh_seconds"] is None and 'http-equiv="refresh"' not in text
    )
    main(["run"])  # over its own page
    assert sorted(each.name for each in tmp_path.iterdir()) == ["run", "runs.html"]


def test_it_follows_until_all_have_ended(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", [row(1)], is_at_work=True)
    monkeypatch.chdir(tmp_path)
    seen = []

    def meanwhile(seconds):
        """Between two pages: another row; none, as when a run begins anew; the end."""
        seen.append(data_of((tmp_path / "runs.html").read_text()))
        assert seconds >= 0.5
        rows = [[row(1), row(2)], [], [row(1)]][len(seen) - 1]
        (run / "metrics.jsonl").write_text(lines(rows))
        if len(seen) == 3:
            (run / "events.jsonl").write_text(lines([event(1.0, 1, "stopped")]))
            (run / "lock").unlink()

    monkeypatch.setattr("ulysses_jax.runs.__main__.time.sleep", meanwhile)
    main(["run", "--follow", "--seconds", "0.5"])
    last = data_of((tmp_path / "runs.html").read_text())
    steps = [each["runs"][0]["along"]["steps"] for each in [*seen, last]]
    assert steps == [[1], [1, 2], [], [1]]
    refresh = [each["refresh_seconds"] is not None for each in [*seen, last]]
    assert refresh == [True, True, True, False]


@pytest.mark.parametrize(
    "options, said",
    [
        (["gone"], "gone is not there: give runs/x"),
        (["rum"], "rum is not there: give run\n"),
        (["runs"], "runs is no run's folder: it has no config.yaml: give runs/x\n"),
        (["run", "--output", "."], "--output . is a folder: give a file, such as runs"),
        (["run", "--seconds", "5"], "--seconds 5 is of --follow: give both, or neit"),
        (["new"], "no step was taken yet"),
        (["starting"], "the run in starting has taken no step yet"),
        (["run", "run"], "stands twice"),
        (["bad"], "bad/config.yaml is not valid YAML"),
        (["run", "--output", "notes.html"], "is there and no page of this program"),
        (["run", "--output", "no/such/page.html"], "there is no folder no/such: make"),
        (["run", "--follow", "--seconds", "0"], "give more than 0"),
    ],
)
def test_errors_are_words_and_exit_code_2(tmp_path, monkeypatch, capsys, options, said):
    write_run(tmp_path / "run", [row(1)])
    write_run(tmp_path / "new", [])
    (write_run(tmp_path / "bad", [row(1)]) / "config.yaml").write_text("a: [")
    (tmp_path / "starting").mkdir()
    (tmp_path / "starting" / "lock").write_text("")
    (tmp_path / "notes.html").write_text("mine")
    write_run(tmp_path / "runs" / "x", [row(1)])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(options)
    words = capsys.readouterr().err
    assert end.value.code == 2 and said in words and words.count("\n") == 1
    assert (tmp_path / "notes.html").read_text() == "mine"
    assert not list(tmp_path.glob("*.new")) and not (tmp_path / "runs.html").exists()


def test_a_page_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    write_run(tmp_path / "run", [row(1)])
    monkeypatch.chdir(tmp_path)
    main(["run"])
    before = (tmp_path / "runs.html").read_text()

    def full(self, target):
        raise OSError("the disk is full")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(SystemExit):
        main(["run"])
    assert (tmp_path / "runs.html").read_text() == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["run", "runs.html"]


def test_a_run_without_a_step_beside_others(tmp_path):
    text = page_of(
        write_run(tmp_path / "run", [row(1)]), write_run(tmp_path / "new", [])
    )
    assert ["steps", "1 of 100", "none yet"] in table_of(text, "Results")


@pytest.mark.slow
def test_a_million_rows(tmp_path):
    """The figures of docs/runs_page.md: with -s."""
    names = [f"field_{number}" for number in range(8)]
    run = write_run(tmp_path / "run", [])
    with open(run / "metrics.jsonl", "w") as file:
        for step in range(1, 10**6 + 1):
            fields = {name: step / (number + 7) for number, name in enumerate(names)}
            file.write(
                lines([row(step, 1 + 1 / step, unix_seconds=9.0 + step, **fields)])
            )
    page_file = tmp_path / "runs.html"
    # The peak of this program alone: resource's is that of what started it, too.
    measured = (
        "import resource, sys; from ulysses_jax.runs.__main__ import main; "
        "main(sys.argv[1:]); status = open('/proc/self/status').read(); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_utime, "
        "int(status.split('VmHWM:')[1].split()[0]) / 2**20)"
    )
    words = (measured, run, "--output", page_file)
    ended = subprocess.run(
        [sys.executable, "-c", *words],
        check=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    seconds, gibibytes = map(float, ended.stdout.split()[-2:])
    written = (run / "metrics.jsonl").stat().st_size
    size = page_file.stat().st_size
    print(
        f"{written / 1e6:.0f} MB of rows, {seconds:.0f} s of one core, "
        f"{gibibytes:.1f} GiB, a page of {size / 1e6:.1f} MB"
    )
    assert size < 10**6 and gibibytes < 1
