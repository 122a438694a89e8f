"""Processes that die, hang and are told to stop, for real: what the others do."""

import json
import re
import signal
import socket
import time

import pytest
import yaml
from pod_cases import STEPS, Pod, waits_at
from pod_cases import config_file as config_file

from ulysses_jax.training.endings import LOST


@pytest.fixture(scope="module")
def unbroken(config_file, tmp_path_factory):
    """The losses of a run that nothing happens to."""
    with Pod(config_file, tmp_path_factory.mktemp("whole") / "run") as pod:
        assert pod.ended(0, 1, seconds=200)[0] == [0, 0], pod.said(0) + pod.said(1)
        return pod.losses()


def goes_on(config_file, folder, unbroken, after, num=2):
    """The same command, to the losses of a run that was not broken."""
    with Pod(config_file, folder, num) as pod:
        codes, _ = pod.ended(*range(num), seconds=200)
        assert codes == [0] * num, pod.said(0)
        found = re.search(r"resuming after step (\d+) of", pod.said(0))
        assert after == (found and int(found[1]))
        assert pod.losses() == unbroken


@pytest.mark.parametrize(
    "rank", [1, pytest.param(0, marks=pytest.mark.slow)], ids=["one", "the coordinator"]
)
def test_a_process_that_is_killed_in_a_step(config_file, tmp_path, unbroken, rank):
    with Pod(config_file, tmp_path / "run", at_step=waits_at(7)) as pod:
        pod.until(rank, "step 7\n")
        pod.send(rank, signal.SIGKILL)
        codes, seconds = pod.ended(1 - rank, seconds=60)
        said = pod.said(1 - rank)
        assert codes == [LOST] and seconds < 30, said
    host = socket.gethostname() if rank else "127.0.0.1"
    assert f"process {rank} on {host} gives no sign of life" in said
    assert "the same command goes on" in said
    goes_on(config_file, tmp_path / "run", unbroken, after=4)


@pytest.mark.slow
def test_one_of_four_is_killed(config_file, tmp_path):
    with Pod(config_file, tmp_path / "whole", 4) as pod:
        codes, _ = pod.ended(*range(4), seconds=200)
        assert codes == [0] * 4, pod.said(0)
        unbroken = pod.losses()
    with Pod(config_file, tmp_path / "run", 4, at_step=waits_at(7)) as pod:
        pod.until(2, "step 7\n")
        pod.send(2, signal.SIGKILL)
        codes, seconds = pod.ended(0, 1, 3, seconds=60)
        assert codes == [LOST] * 3 and seconds < 30
        for rank in (0, 1, 3):
            assert "process 2 on" in pod.said(rank)
    goes_on(config_file, tmp_path / "run", unbroken, after=4, num=4)


@pytest.mark.slow
def test_thirty_seconds_are_enough(config_file, tmp_path):
    """With the silence that a run really waits for."""
    silence = {"silent": 30.0, "at_step": waits_at(3)}
    with Pod(config_file, tmp_path / "run", **silence) as pod:
        pod.until(1, "step 3\n")
        pod.send(1, signal.SIGKILL)
        codes, seconds = pod.ended(0, seconds=90)
        assert codes == [LOST] and seconds < 60
        assert "gives no sign of life" in pod.said(0)


IN_A_SAVE = """
from ulysses_jax.training import checkpoint
write_commit = checkpoint.write_commit
def long(*args):
    print("writing", flush=True)
    time.sleep(3600 if args[1]["step"] == 8 else 0)
    write_commit(*args)
checkpoint.write_commit = long
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_in_a_save(config_file, tmp_path, unbroken, rank):
    """The save that it was in is none; the one before it is used."""
    with Pod(config_file, tmp_path / "run", prelude=IN_A_SAVE) as pod:
        pod.until(rank, "step 9\n")
        pod.send(rank, signal.SIGKILL)
        codes, seconds = pod.ended(1 - rank, seconds=60)
        assert codes == [LOST] and seconds < 30, pod.said(1 - rank)
    goes_on(config_file, tmp_path / "run", unbroken, after=4)


WHILE_IT_COMPILES = """
from ulysses_jax.training import run
abstract_state = run.abstract_state
def long(*args):
    print("compiles", flush=True)
    time.sleep(3600 if jax.process_index() == 1 else 0)
    return abstract_state(*args)
run.abstract_state = long
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_in_start_up(config_file, tmp_path, rank):
    with Pod(config_file, tmp_path / "run", prelude=WHILE_IT_COMPILES) as pod:
        pod.until(rank, "compiles\n")
        pod.send(rank, signal.SIGKILL)
        codes, seconds = pod.ended(1 - rank, seconds=60)
        assert codes == [LOST] and seconds < 30, pod.said(1 - rank)
        assert f"process {rank} on" in pod.said(1 - rank)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_stopped(config_file, tmp_path, rank):
    """Its sockets take whatever is sent: nothing but its silence says so."""
    with Pod(config_file, tmp_path / "run", at_step=waits_at(3)) as pod:
        pod.until(rank, "step 3\n")
        pod.send(rank, signal.SIGSTOP)
        codes, seconds = pod.ended(1 - rank, seconds=60)
        said = pod.said(1 - rank)
        assert codes == [LOST] and seconds < 30, said
        assert f"process {rank} on" in said
        # Where the one that is left stands: in the loop.
        assert f"process {1 - rank} stands here:" in said and "training/loop.py" in said
        pod.send(rank, signal.SIGCONT)
        assert pod.ended(rank, seconds=60)[0] == [LOST]


@pytest.fixture
def impatient(config_file, tmp_path):
    path = tmp_path / "hangs.yaml"
    config = yaml.safe_load(config_file.read_text())
    config["training"]["hang_minutes"] = 0.1
    path.write_text(yaml.safe_dump(config))
    return path


def stands(pod, rank):
    """The stacks of a process's threads, as it says them; its main thread's is last."""
    _, stacks, *_ = pod.said(rank).split(f"process {rank} stands here:\n")
    return [each for each in stacks.split("\n\n") if "most recent call first" in each]


@pytest.mark.slow
def test_a_wait_without_end(impatient, tmp_path):
    """The process lives; its main thread waits for a batch that never comes. The other
    one has its own, and waits for what they compute together."""
    seconds = {(5, 1): 3600, (6, 0): 4}  # of a step and process
    sleeps = f"time.sleep({seconds}.get((number, jax.process_index()), 0))"
    with Pod(impatient, tmp_path / "run", at_step=sleeps) as pod:
        pod.until(1, "step 5\n")
        codes, seconds = pod.ended(0, 1, seconds=60)
        assert codes == [LOST] * 2 and seconds < 30
        for rank in range(2):
            hangs = r"^step 5 of process 1 hangs: \d+ s of waiting for data; the same"
            assert re.search(hangs, pod.said(rank), re.M), pod.said(rank)
        assert " in slow\n" in stands(pod, 1)[-1], pod.said(1)
        assert "training/loop.py" in stands(pod, 0)[-1], pod.said(0)


@pytest.mark.slow
def test_a_save_without_end(config_file, impatient, tmp_path, unbroken):
    """On a disk that hangs: the next save waits for it, and the processes live."""
    with Pod(impatient, tmp_path / "run", prelude=IN_A_SAVE) as pod:
        pod.until(0, "step 12\n")
        codes, seconds = pod.ended(0, 1, seconds=60)
        assert codes == [LOST] * 2 and seconds < 30
        for rank in range(2):
            hangs = r"^step 12 of process [01] hangs: \d+ s of waiting for checkpoint; "
            assert re.search(hangs, pod.said(rank), re.M), pod.said(rank)
            assert "checkpoint.py" in stands(pod, rank)[-1], pod.said(rank)
        assert any(" in long\n" in each for each in stands(pod, 0)), pod.said(0)
    goes_on(config_file, tmp_path / "run", unbroken, after=4)


@pytest.mark.parametrize(
    "ranks",
    [[1], *(pytest.param(told, marks=pytest.mark.slow) for told in ([0], [0, 1]))],
    ids=["one", "the first", "all at once"],
)
def test_told_to_stop_all_save_one_step(config_file, tmp_path, unbroken, ranks):
    """By a signal to one of them, or to all, as schedulers send it; who is told says at
    once that it heard."""
    in_a_long_step = "time.sleep(5 * (number == 5))"
    with Pod(config_file, tmp_path / "run", at_step=in_a_long_step) as pod:
        for rank in ranks:
            pod.until(rank, "step 5\n")
        for rank in ranks:
            pod.send(rank, signal.SIGTERM)
        for rank in ranks:
            pod.until(rank, "SIGTERM: step", seconds=4)
            assert "stopped at" not in pod.said(rank)  # it said so before
        codes, seconds = pod.ended(0, 1, seconds=60)
        assert codes == [130, 130] and seconds < 30, pod.said(0) + pod.said(1)
        (found,) = re.findall(r"stopped at step (\d+); .* it is saved", pod.said(0))
        assert 5 <= int(found) <= 8 and "Traceback" not in pod.said(0) + pod.said(1)
        assert pod.losses() == unbroken[: int(found)]
    commit = tmp_path / "run" / "checkpoints" / found / "commit.json"
    assert commit.is_file()
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    ends = [(e["event"], e["step"]) for e in map(json.loads, lines)]
    assert ends[-1] == ("stopped", int(found))
    assert sum(event == "told" for event, _ in ends) == (0 in ranks)
    if ranks == [0]:  # once is enough
        goes_on(config_file, tmp_path / "run", unbroken, after=int(found))


@pytest.mark.slow
def test_told_to_stop_in_a_later_stage(config_file, tmp_path):
    """Where the processes stood at the end of the stage before is of no account."""
    path = tmp_path / "stages.yaml"
    stages = [{"training": {"num_steps": number}} for number in (4, 40)]
    config = yaml.safe_load(config_file.read_text()) | {"stages": stages}
    path.write_text(yaml.safe_dump(config))
    with Pod(path, tmp_path / "run") as pod:
        pod.until(1, "step 8\n", seconds=300)
        pod.send(1, signal.SIGTERM)
        codes, seconds = pod.ended(0, 1, seconds=60)
        assert codes == [130, 130] and seconds < 30, pod.said(0) + pod.said(1)


@pytest.mark.slow
def test_the_same_signal_again_ends_all_at_once(config_file, tmp_path):
    with Pod(config_file, tmp_path / "run", at_step="time.sleep(20)") as pod:
        pod.until(1, "step 1\n")
        pod.send(1, signal.SIGINT)
        time.sleep(0.5)
        pod.send(1, signal.SIGINT)
        codes, seconds = pod.ended(1, 0, seconds=18)
        assert codes == [130, 130] and seconds < 15
        assert "process 1 was interrupted" in pod.said(0)


@pytest.mark.slow
def test_told_to_stop_while_it_compiles(config_file, tmp_path):
    """Before the first step there is nothing to save, and no reason to wait."""
    with Pod(config_file, tmp_path / "run", prelude=WHILE_IT_COMPILES) as pod:
        pod.until(1, "compiles\n")
        pod.send(1, signal.SIGTERM)
        codes, seconds = pod.ended(0, 1, seconds=30)
        assert codes == [130, 130] and seconds < 10
        assert "process 1 was interrupted" in pod.said(0)


@pytest.mark.slow
def test_it_saves_by_time(config_file, tmp_path):
    """By process 0's clock, at one step on all."""
    path = tmp_path / "minutes.yaml"
    config = yaml.safe_load(config_file.read_text())
    config["training"] |= {
        "checkpoint_interval_steps": 1000,
        "checkpoint_interval_minutes": 1 / 60,
        "keep_checkpoints": 100,
    }
    path.write_text(yaml.safe_dump(config))
    with Pod(path, tmp_path / "run") as pod:
        assert pod.ended(0, 1, seconds=200)[0] == [0, 0]
    saved = sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved[-1] == STEPS and 2 <= len(saved) <= 6


OTHER_CODE = """
from ulysses_jax.training import alike
code = alike._code
alike._code = lambda: "other" if endings.store.this_process() == 1 else code()
"""


@pytest.mark.slow
def test_one_with_other_code(config_file, tmp_path):
    """Before anything is compiled or written."""
    with Pod(config_file, tmp_path / "run", prelude=OTHER_CODE) as pod:
        codes, _ = pod.ended(0, 1, seconds=60)
        assert codes == [2, 2]
        for rank in range(2):
            assert "the code of ulysses_jax is other, there" in pod.said(rank)
        assert "process 1 on" in pod.said(0) and "Traceback" not in pod.said(0)
    assert not (tmp_path / "run").exists()
