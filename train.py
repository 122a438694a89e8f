"""Trains a transformer on sequences that are spread over a mesh: the story of a run.

    python train.py --config configs/tiny.yaml
    python train.py --config configs/tiny.yaml --mesh.seq 8 --training.num-steps 500

The same command again resumes the run from its last checkpoint. On a pod every host
runs the same line: see docs/pods.md.
"""

import dataclasses
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import NoReturn

import jax
from jax.sharding import AxisType, NamedSharding

from ulysses_jax.config_file import load_from_command_line
from ulysses_jax.data.loader import batches, validation_batches
from ulysses_jax.data.open import open_data, refuse_other_data
from ulysses_jax.memory.offload import check_host_memory, check_offload, memory_stats
from ulysses_jax.mesh import (
    devices_per_host,
    make_mesh,
    platform_of,
    simulate_cpu_devices,
    start_distributed,
)
from ulysses_jax.plan.head_chunks import place_on
from ulysses_jax.plan.targets import target_of
from ulysses_jax.training.checkpoint import Checkpointer
from ulysses_jax.training.choose_memory import choose_memory
from ulysses_jax.training.metrics import RunLog
from ulysses_jax.training.preflight import (
    agreed,
    architecture,
    check_folder,
    check_space,
    refuse_other_model,
)
from ulysses_jax.training.report import describe
from ulysses_jax.training.state import abstract_state, host_bytes, init_state
from ulysses_jax.training.step import (
    abstract_batch,
    batch_shape,
    batch_spec,
    jit_train_step,
    make_validation_step,
)


def main(argv: list[str]) -> None:
    # ---- What to run, and on what. All that can be refused is refused here, before
    # anything is compiled or written.
    tried: list[str] = []
    with refused(ValueError, OSError):
        config = load_from_command_line(argv, program="train.py")
        simulate_cpu_devices(config.run.simulated_cpu_devices)
        start_distributed(**dataclasses.asdict(config.distributed))
        mesh = make_mesh(**dataclasses.asdict(config.mesh), axis_type=AxisType.Explicit)
        # Of the same device on every process: all must compile one program.
        target = target_of(mesh.devices.flat[0])
        config = place_on(config, dict(mesh.shape), target, devices_per_host())
        training = config.training
        data = open_data(config)
        if config.memory.auto:
            config, tried = choose_memory(config, mesh)
        check_host_memory(config.memory.offload, mesh.local_devices[0])
        with jax.set_mesh(mesh):
            shapes = abstract_state(config)
            step = jit_train_step(config, platform_of(mesh))
            step = step.trace(shapes, abstract_batch(config))
        assert config.run.folder is not None
        folder = Path(config.run.folder)
        checkpointer = Checkpointer(
            folder / "checkpoints",
            interval_steps=training.checkpoint_interval_steps,
            keep=training.keep_checkpoints,
        )
    # What a process finds on its own disk, all processes must hear of.
    with refused(ValueError, OSError), agreed():
        check_folder(folder)
        meta = {"model": architecture(config.model), "data": data.meta}
        saved = checkpointer.latest_meta()
        if saved is not None:
            refuse_other_model(saved[1]["model"], meta["model"])
            refuse_other_data(saved[1]["data"], meta["data"])
        state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
        check_space(checkpointer.folder, state_bytes, checkpointer.keep)

    is_main = jax.process_index() == 0
    say = partial(print, flush=True) if is_main else lambda *_: None
    for line in (*describe(config, shapes), *data.notes, *tried):
        say(line)

    with jax.set_mesh(mesh):
        # ---- The state: restored onto this mesh, or drawn from the seed, made sharded.
        with refused(ValueError):
            restored = checkpointer.restore(shapes, on_skipped=say)
        if restored is None:
            first_step, state = 0, jax.jit(partial(init_state, config))()
        else:
            first_step, state, _ = restored
            say(f"resuming after step {first_step} of {training.num_steps}")
        if first_step >= training.num_steps:
            say(f"{folder}: nothing left to do; raise --training.num-steps to go on")
            return checkpointer.close()

        # ---- The step, compiled once.
        started = time.monotonic()
        step = step.lower().compile()
        with refused(ValueError):
            check_offload(
                host_bytes(config, shapes), memory_stats(step), platform_of(mesh)
            )
        validate = jax.jit(make_validation_step(config))
        say(f"compiled the step in {time.monotonic() - started:.0f} s")

        # ---- The loop.
        shape, sharding = batch_shape(config), NamedSharding(mesh, batch_spec(mesh))
        members = config.zigzag_members()
        stream = batches(
            data.train,
            shape,
            sharding,
            seed=config.run.seed,
            start_step=first_step,
            zigzag_members=members,
        )

        def validation_loss() -> float:
            total, count = 0.0, 0
            assert data.validation is not None
            for batch in validation_batches(
                data.validation,
                shape,
                sharding,
                num_batches=training.validation_batches,
                zigzag_members=members,
            ):
                part, tokens = validate(state.parameters, batch)
                total, count = total + float(part), count + int(tokens)
            return total / count

        validates = data.validation is not None and training.validation_batches > 0
        every = training.validation_interval_steps or training.num_steps
        with refused(OSError):
            log = RunLog(
                folder,
                num_steps=training.num_steps,
                quiet=config.quiet,
                first_step=first_step,
                is_main=is_main,
            )
            if is_main:
                (folder / "config.yaml").write_text(config.to_yaml())
        number = first_step
        with (
            refused(OSError, ValueError),
            log,
            checkpointer,
            closing(stream),
            told_to_stop() as stopping,
        ):
            try:
                while number < training.num_steps:
                    number += 1
                    started = time.monotonic()
                    state, metrics = step(state, next(stream))
                    row = {name: float(value) for name, value in metrics.items()}
                    seconds = time.monotonic() - started
                    if not all(map(math.isfinite, row.values())):
                        raise ValueError(
                            f"the loss is {row['loss']} and the gradient's norm "
                            f"{row['gradient_norm']} at step {number}: lower "
                            "training.learning_rate; the same command resumes from the "
                            "last checkpoint, if there is one"
                        )
                    tokens = training.batch_size * training.sequence_tokens
                    log.log_step(
                        number,
                        tokens_per_second=tokens / seconds,
                        seconds=seconds,
                        **row,
                    )
                    last = number == training.num_steps
                    if validates and (last or number % every == 0):
                        log.log_validation(number, validation_loss())
                    # On a pod the others may be a step behind: none can save alone.
                    stops = stopping.is_set() and jax.process_count() == 1
                    if checkpointer.due(number) or last or stops:
                        checkpointer.save(number, state, meta)
                    if stops and not last:
                        checkpointer.wait()
                        log.say(
                            f"stopped at step {number}, which is saved: the same "
                            "command resumes there"
                        )
                        stop(130)
                    if stopping.is_set() and not last:
                        raise KeyboardInterrupt
                checkpointer.wait()
                log.finish()
            except KeyboardInterrupt:
                log.say(
                    f"interrupted at step {number}: the same command resumes from the "
                    f"last checkpoint in {checkpointer.folder}, if there is one"
                )
                stop(130)


@contextmanager
def told_to_stop() -> Iterator[threading.Event]:
    """Set by Ctrl-C or SIGTERM, to end after the step; a second Ctrl-C ends at once."""
    event = threading.Event()

    def tell(*_) -> None:
        event.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {
        each: signal.signal(each, tell) for each in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield event
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def refused(*kinds: type[Exception]) -> Iterator[None]:
    """Turns an error of the user's input or disk into one line and exit code 2.

    A ValueError from elsewhere than this project is a fault of the program, and keeps
    its traceback.
    """
    try:
        yield
    except kinds as error:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        ours = Path(raised_in).resolve().is_relative_to(Path(__file__).resolve().parent)
        if isinstance(error, ValueError) and not ours:
            raise
        print(f"train.py: {error}", file=sys.stderr, flush=True)
        stop(2)


def stop(code: int) -> NoReturn:
    """Ends this process; on a pod at once, since others may wait in a collective."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        print("train.py: interrupted before the first step", file=sys.stderr)
        sys.exit(130)
