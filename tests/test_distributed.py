"""A process as one of many: what starts it, and words for what would hang or crash."""

import json
import re
import socket
import threading
import time
from contextlib import ExitStack, closing, suppress

import jax
import pytest

from ulysses_jax import roll_call
from ulysses_jax.distributed import start_distributed


@pytest.fixture
def started(monkeypatch, no_launcher):
    """What `jax.distributed.initialize` is called with; nothing starts, or waits."""
    calls = []
    monkeypatch.setattr(roll_call, "STRANGER_SECONDS", 0.0)
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *a, **k: calls.append((a, k))
    )
    return calls


@pytest.fixture
def port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture
def port_in_use():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.fixture
def called(monkeypatch):
    """The roll, as if all had answered."""
    monkeypatch.setattr(roll_call, "find_host", lambda *_: None)
    monkeypatch.setattr(roll_call, "hold", lambda server, *_: server.close())
    monkeypatch.setattr(roll_call, "answer", lambda *_: None)


def test_flags_start_this_process(started, called, port):
    jax.config.update("jax_enable_preemption_service", True)
    start_distributed(f"localhost:{port}", 2, 0)
    ((positional, named),) = started
    # Which would keep SIGTERM from Python.
    assert not jax.config.jax_enable_preemption_service
    assert positional == (f"localhost:{port}", 2, 0)
    assert named["local_device_ids"] is None
    start_distributed("nobody looks", 1, 0)
    assert len(started) == 1


def test_flags_under_a_launcher_take_its_share_of_the_gpus(
    started, called, port_in_use, monkeypatch
):
    """As with Open MPI 5, which does not say where process 0 is."""
    for name, value in dict(SIZE=8, RANK=3, LOCAL_SIZE=8, LOCAL_RANK=3).items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", str(value))
    start_distributed(f"127.0.0.1:{port_in_use}", 8, 3)  # process 0 listens
    assert started[0][1]["local_device_ids"] == [3]


@pytest.mark.parametrize(
    "coordinator, message",
    [
        ("localhost", "is not host:port, such as host0:1234"),
        ("localhost:port", "is not host:port"),
        ("localhost:0", "with a port of 1 to 65535"),
        ("localhost:65536", "with a port of 1 to 65535"),
        (":1234", "is not host:port"),
        ("", "is not host:port"),
        ("no-such-host.invalid:1234", "'no-such-host.invalid' is not known"),
        ("a..b:1234", "'a..b' is not known"),
    ],
)
@pytest.mark.parametrize("process_id", [0, 1])
def test_a_coordinator_that_cannot_be(
    started, monkeypatch, coordinator, message, process_id
):
    with pytest.raises(ValueError, match=f"distributed.coordinator.*{message}"):
        start_distributed(coordinator, 2, process_id, 1e-6)
    assert not started


def test_nobody_at_the_coordinators_port(started, monkeypatch, port):
    with pytest.raises(ValueError, match="process 0 is not there after 0 s"):
        start_distributed(f"127.0.0.1:{port}", 2, 1, 1e-6)
    assert not started


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_no_time_to_wait(started, port, seconds):
    with pytest.raises(ValueError, match="wait_seconds .*: give more than 0"):
        start_distributed(f"127.0.0.1:{port}", 2, 1, seconds)


def gather(port, *calls, seconds=20.0):
    """What each process meets that answers the roll, process 0 first: an error or
    nothing."""
    met = {}

    def run(index, process, of):
        address = "127.0.0.1", port
        try:
            if process:
                roll_call.answer(address, process, of, seconds)
            else:
                roll_call.hold(socket.create_server(address), of, seconds)
            met[index] = None
        except ValueError as error:
            met[index] = error

    threads = [
        threading.Thread(target=run, args=(index, *call))
        for index, call in enumerate(calls)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [met[index] for index in range(len(calls))]


def test_the_roll_is_called(port):
    assert gather(port, (0, 3), (1, 3), (2, 3)) == [None] * 3


@pytest.mark.parametrize(
    "calls, message",
    [
        ([(0, 3), (1, 3), (1, 3)], "two processes are number 1, on .* and on "),
        ([(0, 2), (1, 3)], "process 1 on .* knows of 3 processes, process 0 of 2"),
        ([(0, 3), (1, 2)], "process 1 on .* knows of 2 processes, process 0 of 3"),
        ([(0, 3), (2, 3)], r"of 3 processes \[1\] did not come in 2 s .*: start them"),
    ],
    ids=["one number twice", "more", "fewer", "one is missing"],
)
def test_all_are_told_who_is_wrong(monkeypatch, capsys, port, calls, message):
    monkeypatch.setattr(roll_call, "SAYS_SO_SECONDS", 0.5)
    met = gather(port, *calls, seconds=2.0)
    assert all(re.search(message, str(each)) for each in met), met
    is_absent = "did not come" in message  # which ends with another code
    assert [isinstance(each, roll_call.Absent) for each in met] == [is_absent] * len(
        met
    )
    if is_absent:
        # As it was when the others had a while to come: the second one may have.
        waits = r"waiting for processes \[1(, 2)?\] of 3 to come, for \d s more at most"
        assert re.search(waits, capsys.readouterr().err)


def test_one_that_ended_may_come_again(port):
    """While others are missing; whoever starts it again need not start all."""
    call = json.dumps({"process": 1, "of": 3, "host": "h"}).encode() + b"\n"
    held = threading.Thread(
        target=roll_call.hold,
        args=(socket.create_server(("127.0.0.1", port)), 3, 20.0),
    )
    held.start()
    with socket.create_connection(("127.0.0.1", port)) as ended:
        ended.sendall(call)
        time.sleep(0.2)
    met = []

    def come(process):
        try:
            roll_call.answer(("127.0.0.1", port), process, 3, 20.0)
        except ValueError as error:
            met.append(str(error))

    both = [threading.Thread(target=come, args=(process,)) for process in (1, 2)]
    for each in both:
        time.sleep(1.5)
        each.start()
    for each in (*both, held):
        each.join(20)
    assert met == []


def test_who_comes_late_is_told_for_whom_it_waits(monkeypatch, port):
    """When the others have long been told; again and again."""
    monkeypatch.setattr(roll_call, "SAYS_SO_SECONDS", 0.5)
    server = socket.create_server(("127.0.0.1", port))
    failed = []

    def hold():
        try:
            roll_call.hold(server, 3, 4.0)
        except roll_call.Absent as error:
            failed.append(str(error))

    held = threading.Thread(target=hold)
    held.start()
    time.sleep(1.2)
    call = {"process": 1, "of": 3, "host": "h"}
    with socket.create_connection(("127.0.0.1", port)) as late:
        late.sendall(json.dumps(call).encode() + b"\n")
        late.settimeout(10)
        lines = [json.loads(line) for line in late.makefile()]
    held.join(10)
    kinds = [kind for kind, _ in lines]
    assert kinds[0] == "heard" and kinds[-1] == "absent" and len(kinds) > 3
    assert set(kinds[1:-1]) == {"waiting"}
    assert all("processes [2] of 3" in said for _, said in lines[2:-1])
    assert failed == [lines[-1][1]]


def test_a_process_0_that_hangs_is_not_waited_for(monkeypatch, port):
    """As one that is stopped: it says no more that it waits."""
    monkeypatch.setattr(roll_call, "SAYS_SO_SECONDS", 0.5)
    monkeypatch.setattr(roll_call, "_LINE_SECONDS", 0.5)
    with serving(port, b'["heard", ""]\n', then_seconds=60):
        started = time.monotonic()
        with pytest.raises(roll_call.Absent, match="process 0 ended, or hangs"):
            roll_call.answer(("127.0.0.1", port), 1, 2, 20.0)
    assert time.monotonic() - started < 15


JUNK = {
    "HTTP": b"GET / HTTP/1.0\r\n\r\n\n",
    "nothing": b"",
    "no line": b"x",
    "no fields": b"{}\n",
    "a list": b"[1]\n",
    "deep": b"[" * 4000 + b"\n",
    "long": b"x" * 100_000,
    "too large a number": b'{"process": 7, "of": 2, "host": "h"}\n',
    "process 0": b'{"process": 0, "of": 2, "host": "h"}\n',
    "a negative number": b'{"process": -1, "of": 2, "host": "h"}\n',
    "a number in words": b'{"process": "1", "of": "2", "host": "h"}\n',
    "a part of a number": b'{"process": 1.5, "of": 2, "host": "h"}\n',
    "true": b'{"process": true, "of": 2, "host": "h"}\n',
}


@pytest.mark.parametrize("is_left_open", [False, True])
def test_whoever_calls_in_another_way_is_nobody(port, is_left_open):
    """He does not count, and nobody waits for him: a scanner may never close."""
    server = socket.create_server(("127.0.0.1", port))
    held = threading.Thread(target=roll_call.hold, args=(server, 2, 20.0))
    held.start()
    scans = []
    for said in (*JUNK.values(), *[b""] * 100):
        scans.append(socket.create_connection(("127.0.0.1", port)))
        with suppress(OSError):
            scans[-1].sendall(said)
        if not is_left_open:
            scans[-1].close()
    time.sleep(0.5)
    assert held.is_alive()
    started = time.monotonic()
    roll_call.answer(("127.0.0.1", port), 1, 2, 20.0)
    held.join(10)
    assert not held.is_alive() and time.monotonic() - started < 10
    for each in scans:
        each.close()


def test_who_takes_his_time_is_let_go(monkeypatch, port):
    """A letter a second is no line, whatever it is the beginning of; and few may."""
    monkeypatch.setattr(roll_call, "_LINE_SECONDS", 1.0)
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", port)))
        roll = stack.enter_context(closing(roll_call._Roll(server, 2)))
        slow = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            for _ in range(roll_call._MOST_UNHEARD + 5)
        ]
        for _ in slow:
            roll.listen(0.1)
        assert len(roll._callers) == roll_call._MOST_UNHEARD
        for letter in b'{"process"':
            with suppress(OSError):
                slow[-1].sendall(bytes([letter]))
            roll.listen(0.1)
            time.sleep(0.12)
        assert not roll._callers and roll.missing() == [1]


def serving(port, said, then_seconds=0):
    """Another program: what it says to one that calls, before it closes."""
    server = socket.create_server(("127.0.0.1", port))

    def serve():
        while True:
            try:
                other = server.accept()[0]
            except OSError:
                return
            with other, suppress(OSError):
                other.sendall(said) if said is not None else time.sleep(60)
                time.sleep(then_seconds)

    threading.Thread(target=serve, daemon=True).start()
    return server


@pytest.mark.parametrize(
    "said",
    [b"SSH-2.0\n", b"", b"x" * 10_000, b'["what", ""]\n', b"[" * 4000 + b"\n", None],
    ids=["a line", "nothing", "long", "another kind", "deep", "silent"],
)
def test_another_program_at_the_port(monkeypatch, port, said):
    """One that is about to end, as a run before, is waited for; not for long."""
    monkeypatch.setattr(roll_call, "STRANGER_SECONDS", 1.0)
    monkeypatch.setattr(roll_call, "_LINE_SECONDS", 0.5)
    started = time.monotonic()
    with serving(port, said) as server:
        with pytest.raises(ValueError, match="another program is there, or a run"):
            roll_call.answer(("127.0.0.1", port), 1, 2, 20.0)
        server.shutdown(socket.SHUT_RDWR)
    assert 1 < time.monotonic() - started < 10


def test_another_program_that_ends(port):
    server = serving(port, b"SSH-2.0\n")
    met = []
    answering = threading.Thread(
        target=lambda: met.append(roll_call.answer(("127.0.0.1", port), 1, 2, 20.0))
    )
    answering.start()
    time.sleep(1.5)
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    roll_call.hold(socket.create_server(("127.0.0.1", port)), 2, 20.0)
    answering.join(10)
    assert met == [None]


SLURM = dict(
    SLURM_STEP_NODELIST="127.0.0.1", SLURM_NTASKS="2", SLURM_PROCID="0"
) | dict(SLURM_LOCALID="0", SLURM_JOB_ID="1")


def test_a_port_in_use(started, monkeypatch, port_in_use):
    """JAX's own service crashes there."""
    with pytest.raises(ValueError, match=f"port {port_in_use} of this host.*another"):
        start_distributed(f"127.0.0.1:{port_in_use}", 2, 0)
    for name, value in (SLURM | dict(JAX_COORDINATOR_PORT=str(port_in_use))).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="set JAX_COORDINATOR_PORT"):
        start_distributed()
    assert not started


@pytest.mark.parametrize("bind", ["0.0.0.0", "", "host:port", ":70000"])
def test_an_address_to_listen_at_without_a_port(started, monkeypatch, port, bind):
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", bind)
    with pytest.raises(ValueError, match=f"BIND_ADDRESS is '{bind}', not host:port"):
        start_distributed(f"127.0.0.1:{port}", 2, 0)
    assert not started


@pytest.mark.parametrize("port", ["", "any", "0", "70000"])
def test_no_port_for_jax(started, monkeypatch, port):
    for name, value in (SLURM | dict(JAX_COORDINATOR_PORT=port)).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"JAX_COORDINATOR_PORT is '{port}', not a"):
        start_distributed()
    assert not started


def test_the_port_that_jax_takes_under_slurm_is_in_use(started, called, monkeypatch):
    """As by another step of the same job: the port follows from the job's number."""
    first = 2**16 - 2**12
    with socket.socket() as server:
        for port in range(first, 2**16):
            try:
                server.bind(("127.0.0.1", port))
                break
            except OSError:
                continue
        server.listen()
        job = dict(SLURM_JOB_ID=f"{2**20 + port - first}")
        for name, value in (SLURM | job).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=f"port {port} of this host"):
            start_distributed()
    start_distributed()  # free again
    (((address, num, process), named),) = started
    assert (address, num, process) == (f"127.0.0.1:{port}", 2, 0)
    assert named["local_device_ids"] == [0]


@pytest.mark.parametrize(
    "env, message",
    [
        (
            dict(SLURM_STEP_NODELIST="n0", SLURM_NTASKS="8"),
            "SLURM_PROCID is not set.*with srun.*--distributed.*unset SLURM_STEP_NODEL",
        ),
        (
            dict(WORLD_SIZE="8", RANK="3", MASTER_ADDR="h", MASTER_PORT="1"),
            r"\(WORLD_SIZE=8\) torchrun.*one of 8.*num-processes 8 --distributed."
            "process-id 3.*unset WORLD_SIZE",
        ),
        (dict(PMI_SIZE="8", PMI_RANK="3"), "MPICH.*one of 8 .*unset PMI_SIZE"),
    ],
    ids=["no SLURM_PROCID", "torchrun", "MPICH"],
)
def test_a_launcher_that_says_too_little(started, monkeypatch, env, message):
    """Else each would train alone, without a word."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message) as error:
        start_distributed()
    # The last remedy works.
    monkeypatch.delenv(re.findall(r"unset (\w+)", str(error.value))[0])
    start_distributed()
    assert not started


def test_what_jax_cannot_read_of_a_launcher_is_said_in_words(monkeypatch, no_launcher):
    for name in ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.setenv(name, "2")
    with pytest.raises(ValueError, match="from Open MPI's .*--distributed.coordinator"):
        start_distributed()
