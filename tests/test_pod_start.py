"""Processes that were told wrong, or are not there: words and a code on each one."""

import re
import signal
import subprocess
import sys

import pytest
import yaml
from pod_cases import Pod, free_port
from pod_cases import config_file as config_file
from test_distributed import serving

from ulysses_jax.aborts import LOST

pytestmark = pytest.mark.slow
# So long the last one may take, with ten more for the imports before.
WITHIN = 20
SOON = ["--distributed.wait-seconds=20"]


@pytest.mark.parametrize(
    "ranks, of, message",
    [
        ([0, 1, 1], [3, 3, 3], "two processes are number 1, on "),
        ([0, 1], [2, 3], "process 1 on .* knows of 3 processes, process 0 of 2"),
    ],
    ids=["one number twice", "another number of them"],
)
def test_told_wrong(config_file, tmp_path, ranks, of, message):
    with Pod(config_file, tmp_path / "run", ranks, of=of) as pod:
        for said in pod.all_end(2, seconds=WITHIN):
            assert re.search(message, said) and "Traceback" not in said


@pytest.mark.parametrize("ranks", [[1, 2], [0, 2]], ids=["the coordinator", "one"])
def test_one_is_missing(config_file, tmp_path, ranks):
    """Those that are there say so in half a minute, and end as for a lost machine."""
    with Pod(config_file, tmp_path / "run", ranks, of=[3] * 2, arguments=SOON) as pod:
        pod.all_start()
        for place in range(2):
            pod.until(place, "waiting for process", seconds=WITHIN)
        who = "process 0 at 127.0.0.1" if 0 not in ranks else r"processes \[1\] of 3"
        for said in pod.all_end(LOST, seconds=2 * WITHIN):
            assert re.search(f"waiting for {who}", said), said
            assert re.search(r"did not come|is not there", said), said
            assert "Traceback" not in said


def test_two_are_process_0(config_file, tmp_path):
    """On one host: the port of the first is not to be had, and it waits in vain."""
    with Pod(config_file, tmp_path / "run", [0, 0], of=[2] * 2, arguments=SOON) as pod:
        codes, _ = pod.ended(0, 1, seconds=120)
        assert sorted(codes) == [2, LOST], pod.said(0) + pod.said(1)
        assert "cannot be the coordinator on port" in pod.said(codes.index(2))
        assert "processes [1] of 2" in pod.said(codes.index(LOST))


def test_one_too_many(config_file, tmp_path):
    """It is told so at once; the others are right."""
    with Pod(config_file, tmp_path / "run", [0, 1, 2], of=[2] * 3) as pod:
        pod.until(2, "starts\n")
        codes, seconds = pod.ended(2, seconds=60)
        assert codes == [2] and seconds < WITHIN
        assert "process_id 2 is not one of 0 to 1" in pod.said(2)
        assert "Traceback" not in pod.said(2)
        assert pod.ended(0, 1, seconds=200)[0] == [0, 0], pod.said(0)


@pytest.mark.parametrize("answer", [None, b"SSH-2.0\n"], ids=["silent", "a server"])
def test_a_port_in_use(config_file, tmp_path, answer):
    port = free_port()
    with serving(port, answer):
        with Pod(config_file, tmp_path / "run", port=port) as pod:
            first, other = pod.all_end(2, seconds=WITHIN)
    assert f"cannot be the coordinator on port {port}" in first
    assert "another program is there" in other


def test_process_0_is_killed_while_they_wait(config_file, tmp_path):
    with Pod(config_file, tmp_path / "run", [0, 1], of=[3] * 2, arguments=SOON) as pod:
        pod.until(1, "waiting for processes [2] of 3")
        pod.send(0, signal.SIGKILL)
        codes, seconds = pod.ended(1, seconds=30)
        assert codes == [LOST] and seconds < 15
        assert "process 0 ended, or hangs; its own output" in pod.said(1)


def test_one_that_ends_before_jax_has_started():
    """JAX waits for it, and aborts."""
    alone = (
        "import jax; from ulysses_jax import distributed, roll_call\n"
        "roll_call.hold = lambda server, *_: server.close()\n"
        "start = jax.distributed.initialize\n"
        "jax.distributed.initialize = lambda *a, **k: start("
        "*a, **k, initialization_timeout=2)\n"
        f"distributed.start_distributed('127.0.0.1:{free_port()}', 2, 0)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", alone], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == LOST
    assert "a process ended before all had started" in ended.stderr


@pytest.fixture
def folders(tmp_path):
    """Two hosts' own, each with a text of the same name."""
    made = [tmp_path / "host0", tmp_path / "host1"]
    for folder in made:
        (folder / "text").mkdir(parents=True)
        (folder / "text" / "a.txt").write_text("alpha beta gamma\n" * 500)
    return made


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda text: (text / "a.txt").write_text("alpha beta gamma\n" * 600),
            "differ between process 0 and processes [1] of 2",
        ),
        (
            lambda text: (text / "b.txt").write_text("more"),
            "differ between process 0 and processes [1] of 2",
        ),
        (lambda text: (text / "a.txt").unlink(), "cannot open data.files"),
    ],
    ids=["another size", "one more", "none"],
)
def test_hosts_with_other_files(config_file, tmp_path, folders, change, message):
    change(folders[1] / "text")
    path = tmp_path / "config.yaml"
    config = yaml.safe_load(config_file.read_text())
    config["data"]["files"] = "text/*.txt"
    path.write_text(yaml.safe_dump(config))
    with Pod(path, tmp_path / "run", folders=folders) as pod:
        first, other = pod.all_end(2, seconds=WITHIN)
    assert message in first and "Traceback" not in first + other
    assert (message if "differ" in message else "text/*.txt") in other
    assert not (tmp_path / "run").exists()
