"""Where the time went: of runs whose every second is known."""

import random
from dataclasses import asdict

import pytest
from run_folders import event, row

from ulysses_jax.runs.goodput import Goodput, goodput
from ulysses_jax.runs.read import columns_of


def reckon(rows, events):
    found = goodput(columns_of(rows), events)
    assert found is not None
    return found


def test_one_process_to_its_end():
    """10 s to start, 4 steps of 2 s with half a second without data in one, a
    validation of 3 s and a checkpoint of 1 s between the second and the third, and the
    same after the last; to write that takes 4 s more."""
    rows = [
        row(1, seconds=2.0, unix_seconds=112.0),
        row(2, seconds=2.0, unix_seconds=114.0, validation_loss=3.0),
        row(3, seconds=2.0, unix_seconds=120.0, checkpoint_seconds=1.0),
        row(4, seconds=2.0, unix_seconds=122.0, data_seconds=0.5, validation_loss=3.0),
    ]
    events = [
        event(100.0, 0, "started"),
        event(110.1, 1, "compiled", seconds=8.0),  # said when its first step is begun
        event(118.0, 2, "saved", seconds=1.0),
        event(126.0, 4, "saved", seconds=1.0),
        event(130.0, 4, "done"),
    ]
    found = reckon(rows, events)
    assert found == Goodput(
        useful=7.5, data=0.5, checkpoint=6.0, validation=6.0, start=10.0
    )
    assert found.whole() == 30.0


def test_killed_and_resumed():
    """Three steps, of which the checkpoint has two; the third and a fourth are lost."""
    rows = [
        row(1, seconds=2.0, unix_seconds=12.0),
        row(2, seconds=2.0, unix_seconds=14.0),
        row(3, seconds=2.0, unix_seconds=77.0),
    ]
    events = [
        event(0.0, 0, "started", lost_steps=0, lost_seconds=0.0),
        event(15.0, 2, "saved", seconds=1.0),
        event(70.0, 2, "started", lost_steps=2, lost_seconds=4.0),
        event(77.0, 3, "stopped"),
    ]
    # It saved from 14 to 15, worked to 19, was down until 70.
    assert reckon(rows, events) == Goodput(
        useful=6.0, checkpoint=1.0, start=10.0 + 5.0, lost=4.0, down=51.0
    )


def test_killed_before_its_first_step_or_checkpoint():
    """What a process did that no row is left of."""
    events = [
        event(0.0, 0, "started"),
        event(9.0, 0, "compiled", seconds=9.0),  # its steps 1 and 2 are cut: 4 s
        event(20.0, 0, "started", lost_steps=2, lost_seconds=4.0),
        event(26.0, 0, "compiled", seconds=6.0),  # killed here
        event(30.0, 0, "started"),
    ]
    assert reckon([row(1, unix_seconds=33.0)], events) == Goodput(
        start=9.0 + 6.0 + 2.0, lost=4.0, down=7.0 + 4.0, useful=1.0
    )


def test_waiting_for_data_while_the_devices_work_loses_nothing():
    rows = [
        row(1, unix_seconds=1.0, data_seconds=0.4, compute_seconds=0.5),
        row(2, unix_seconds=2.0, data_seconds=0.4, compute_seconds=0.001),
    ]
    found = reckon(rows, [event(0.0, 0, "started")])
    assert (found.useful, found.data) == (pytest.approx(1.6), pytest.approx(0.4))


def test_compiling_for_another_length_is_no_step():
    rows = [row(1, unix_seconds=1.0), row(2, unix_seconds=9.0, seconds=8.0)]
    events = [event(0.0, 0, "started"), event(8.0, 2, "compiled", seconds=7.0)]
    assert reckon(rows, events) == Goodput(useful=2.0, start=7.0)


def test_a_skipped_step_is_lost():
    rows = [row(n, unix_seconds=float(n)) for n in (1, 2, 3)]
    del rows[1]["loss"]
    rows[1]["skipped"] = 1
    events = [event(0.0, 0, "started"), event(1.9, 2, "skipped", why="nan")]
    assert reckon(rows, events) == Goodput(useful=2.0, lost=1.0)


def test_steps_that_are_gone_back_from_are_lost_and_so_is_the_way():
    """Of steps 1 to 4 the checkpoint has two; to read it takes three seconds."""
    rows = [row(n, unix_seconds=float(n)) for n in (1, 2, 3, 4)]
    rows.append(row(5, unix_seconds=8.0, checkpoint_seconds=2.9))
    events = [
        event(0.0, 0, "started"),
        event(2.0, 2, "saved", seconds=0.0),
        event(4.1, 4, "spike", why="loss 9 is far above"),
        event(7.0, 4, "rolled_back", to_step=2, num_rows=2),
    ]
    assert reckon(rows, events) == Goodput(useful=3.0, lost=5.0)


def test_an_event_among_lost_steps_makes_them_no_longer():
    rows = [row(1, unix_seconds=1.0), row(2, unix_seconds=21.0)]
    events = [
        event(0.0, 0, "started"),
        event(1.5, 1, "saved", seconds=0.5),
        event(5.0, 5, "skipped", why="nan"),  # of steps 2 to 7, to 7.5, which are cut
        event(20.0, 1, "started", lost_steps=6, lost_seconds=6.0),
    ]
    assert reckon(rows, events) == Goodput(
        useful=2.0, checkpoint=0.5, lost=6.0, down=12.5
    )


def test_rows_of_before_there_were_events_do_not_count():
    rows = [row(1), row(2), row(3, unix_seconds=1003.0)]
    assert reckon(rows, [event(1000.0, 2, "started")]) == Goodput(useful=1, start=2)


@pytest.mark.parametrize("events", [[], [event(5.0, 1, "told", signal="SIGTERM")]])
def test_not_known_where_nothing_says_when_it_started(events):
    assert goodput(columns_of([row(1, unix_seconds=9.0)]), events) is None


def whole(step, unix_seconds, **seconds):
    """A row that has all the time since the one before: a step of a second."""
    parts = {"data": 0.0, "compute": 1.0, "other": 0.0} | seconds
    fields = {f"{part}_seconds": of for part, of in parts.items()}
    return row(step, unix_seconds=unix_seconds, **fields)


def test_rows_that_have_all_the_time_between_them():
    """4 s before the first step, one of them in the loop; a trace of 2 s; after its
    last step 3 s for a validation, 5 s for a checkpoint, and 6 s that no row has."""
    rows = [
        whole(1, 4.0, other=1.0),
        whole(2, 5.0, validation=7.0),  # no loss of a validation says so
        whole(3, 15.0, other=2.0),
        whole(4, 16.0, validation=3.0, checkpoint=5.0),
    ]
    events = [event(0.0, 0, "started"), event(30.0, 4, "done")]
    assert reckon(rows, events) == Goodput(
        useful=4.0, start=2.0, validation=10.0, checkpoint=5.0, other=1.0 + 2.0 + 6.0
    )


def test_a_killed_process_loses_all_the_time_of_its_rows():
    """Of step 3, and of step 2's validation, which is not run again, not: steps 3 and
    4 took 1 s each, and a validation, a checkpoint and a trace 9 s more."""
    rows = [
        whole(1, 3.0),
        whole(2, 4.0, validation=2.0, checkpoint=1.0),
        whole(3, 54.0),
    ]
    events = [
        event(0.0, 0, "started", lost_steps=0, lost_seconds=0.0),
        event(50.0, 2, "started", lost_steps=2, lost_seconds=11.0),
        event(54.0, 3, "done"),
    ]
    assert reckon(rows, events) == Goodput(
        useful=3.0, validation=2.0, checkpoint=1.0, lost=11.0, start=5.0, down=32.0
    )


@pytest.mark.parametrize("end", ["saved", "stopped"])
def test_a_validation_that_a_start_makes_up_is_before_its_first_row(end):
    """50 s of it after 4 s, then a step that is saved in 1 s; killed, or 2 s later
    stopped; down for the rest to 100 s."""
    rows = [
        whole(4, 55.0, validation=50.0, checkpoint=1.0),
        whole(5, 102.0),
    ]
    events = [
        event(0.0, 3, "started", lost_steps=0, lost_seconds=0.0),
        event(56.0, 4, "saved", seconds=1.0),
        *([event(58.0, 4, "stopped")] if end == "stopped" else []),
        event(100.0, 4, "started", lost_steps=0, lost_seconds=0.0),
    ]
    other = 2.0 if end == "stopped" else 0.0
    assert reckon(rows, events) == Goodput(
        useful=2.0,
        validation=50.0,
        checkpoint=1.0,
        start=4.0 + 1.0,
        other=other,
        down=44.0 - other,
    )


@pytest.mark.parametrize("ends", [[], [event(15.0, 1, "stopped")]])
def test_a_validation_after_a_first_row_is_after_it(ends):
    """Of 8 s; or it is stopped within, and the row has no loss of it."""
    loss = {} if ends else {"validation_loss": 2.0}
    rows = [whole(1, 5.0, validation=8.0) | loss, whole(2, 102.0)]
    again = event(100.0, 1, "started", lost_steps=0, lost_seconds=0.0)
    found = reckon(rows, [event(0.0, 0, "started"), *ends, again])
    other = 2.0 if ends else 0.0
    assert found == Goodput(
        useful=2.0, validation=8.0, start=4.0 + 1.0, other=other, down=87.0 - other
    )


def test_rows_that_are_gone_back_from_are_lost_as_a_whole():
    """With the way back; what comes after a step that was skipped is not."""
    rows = [
        whole(1, 1.0),
        whole(2, 2.0, validation=2.0),
        whole(3, 6.0, other=1.0, checkpoint=4.0),
        whole(4, 11.0, validation=3.0) | {"skipped": 1},
    ]
    events = [
        event(0.0, 0, "started"),
        event(9.9, 3, "rolled_back", to_step=1, num_rows=1),
        event(14.0, 4, "done"),
    ]
    assert reckon(rows, events) == Goodput(
        useful=1.0, lost=1 + 2 + 2 + 4 + 1, validation=3
    )


@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_every_second_of_a_made_up_run_is_where_it_belongs(seed, is_whole):
    """Processes that validate, save, skip, and are killed at any step."""
    rows, events, truth = made_up_run(random.Random(seed), is_whole)
    assert truth.lost > 0 and truth.down > 0 and truth.validation > 0
    assert asdict(reckon(rows, events)) == pytest.approx(asdict(truth), abs=1e-6)


def made_up_run(chance: random.Random, is_whole: bool):
    """With whole rows a step is validated anywhere, and something else is done; of
    older ones nobody can tell what was lost of that."""
    now, parts, rows, events = 0.0, Goodput().parts(), [], []

    def pass_by(part: str, seconds: float) -> float:
        nonlocal now
        now += seconds
        parts[part] += seconds
        return seconds

    def give_up(taken) -> float:
        """To `lost`; how much it is."""
        for part, seconds in taken.items():
            parts[part] -= seconds
            parts["lost"] += seconds
        return sum(taken.values())

    saved, lost = 0, {}
    for _ in range(4):
        step = saved
        rows = [each for each in rows if each["step"] <= saved]
        again = sum(map(give_up, lost.values()))
        fields = dict(lost_steps=len(lost), lost_seconds=again)
        events.append(event(now, step, "started", **fields))
        compiling = pass_by("start", chance.uniform(5, 9))
        if not is_whole:  # where it stands between the events is not known
            events.append(event(now, step, "compiled", seconds=compiling))
        pass_by("start", chance.uniform(0, 2))
        lost, between = {}, {}
        killed_at = step + chance.randint(8, 30)
        while step < killed_at:
            step += 1
            taken = {}
            if is_whole:
                taken["other"] = pass_by("other", chance.uniform(0, 0.3))
            data = pass_by("data", chance.uniform(0, 0.2))
            useful = pass_by("useful", chance.uniform(1, 2))
            if chance.random() < 0.1:
                give_up({"data": data, "useful": useful})
                taken["lost"] = data + useful
                between["skipped"] = 1
                events.append(event(now, step, "skipped", why="nan"))
            else:
                taken |= {"data": data, "useful": useful}
            lost[step] = taken
            if is_whole:  # of what is done after the batch is there
                between["other_seconds"] = taken["other"] + useful
            made = row(
                step,
                seconds=data + useful,
                data_seconds=data,
                compute_seconds=0.0,
                unix_seconds=now,
                **between,
            )
            rows.append(made)
            between = {}
            if step % 14 == 0 or (is_whole and step % 3 == 0):
                made["validation_loss"] = 2.5
                seconds = pass_by("validation", chance.uniform(2, 3))
                taken["validation"] = seconds
                if is_whole:
                    made["validation_seconds"] = seconds
            if step % 7 == 0:
                seconds = pass_by("checkpoint", chance.uniform(0.5, 1))
                (made if is_whole else between)["checkpoint_seconds"] = seconds
                events.append(event(now, step, "saved", seconds=seconds))
                saved, lost = step, {}
        after = pass_by("down", chance.uniform(60, 90))
    parts["down"] -= after
    return rows, events, Goodput(**parts)
