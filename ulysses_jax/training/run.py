"""The story of a run, for Python: from a config to its last checkpoint."""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from ulysses_jax.complete import complete
from ulysses_jax.config import Config
from ulysses_jax.costs.head_chunks import place_on
from ulysses_jax.costs.targets import target_of
from ulysses_jax.data.loader import refuse_uncounted
from ulysses_jax.data.open import open_data, refuse_other_data
from ulysses_jax.memory.offload import check_host_memory
from ulysses_jax.mesh import (
    allow_promotion,
    devices_per_host,
    make_mesh,
    platform_of,
    simulate_cpu_devices,
)
from ulysses_jax.models.transformer import Transformer
from ulysses_jax.tensors.expected import open_source
from ulysses_jax.training.alike import refuse_mixed_devices
from ulysses_jax.training.base import fingerprint, open_base, refuse_other_base
from ulysses_jax.training.by_length import (
    Split,
    Steps,
    configs_by_length,
    refuse_moves,
    splits_of,
    with_memory,
)
from ulysses_jax.training.checkpoint import Checkpointer
from ulysses_jax.training.choose_memory import choose_memory
from ulysses_jax.training.load import open_run
from ulysses_jax.training.lock import RunLock
from ulysses_jax.training.loop import Loop, validates_at
from ulysses_jax.training.meta import check_meta, saved_meta
from ulysses_jax.training.metrics import RunLog, lacks_validation
from ulysses_jax.training.model import (
    MakeModel,
    handed_over,
    identity,
    own_name,
)
from ulysses_jax.training.optimizer import rate_change, schedule_fields
from ulysses_jax.training.output import print_every_name
from ulysses_jax.training.preflight import (
    agreed,
    check_folder,
    check_processes,
    check_space,
    refuse_other_model,
    refuse_other_optimizer,
)
from ulysses_jax.training.prepare import prepared
from ulysses_jax.training.report import (
    attention_of,
    describe,
    describe_lengths,
    describe_own,
)
from ulysses_jax.training.signals import Stopped
from ulysses_jax.training.state import (
    abstract_state,
    first_state,
    read_from,
)
from ulysses_jax.training.wandb_run import WandbRun


@allow_promotion()
@print_every_name()
def train(
    config: Config,
    make_model: MakeModel = Transformer,
    *,
    interrupted: Callable[[], Any] | None = None,
) -> Any:
    """Trains a run to its last step, from its last checkpoint where it has one.

    It may be called in any thread, again and again, where JAX was used before and with
    any mesh set; but what can be said only before JAX has devices (the number of
    simulated ones, `distributed.start_distributed`) cannot be said later.

    Args:
      config: of `config_file.load`, or made by hand: it need not be complete. Its
        folder is runs/run where it names none.
      make_model: `f(config.model, rngs=...)`, the module to train: this library's, or
        one of your own, as `training.model.MakeModel` says.
      interrupted: what a second Ctrl-C calls, in a thread of its own; None: what it
        does outside of a run.

    Returns:
      The trained module, on the run's mesh with Auto axes: where that has more than one
      device, call it under `jax.set_mesh(make_mesh(...))` of the same degrees.

    Raises:
      ValueError: the config cannot be run here, with the numbers and a remedy; or a
        number of a step is not finite.
      OSError: the disk cannot be read or written.
      Stopped: a KeyboardInterrupt, after Ctrl-C, SIGTERM, SIGHUP or SIGUSR1 in the main
        thread of any process, and the step that was under way, which is saved.
    """
    return run_once(config, make_model, interrupted, is_last=True)


def on_mesh(
    config: Config, make_model: MakeModel
) -> tuple[Config, Mesh, dict[int, Split]]:
    """The config, complete and placed, and the mesh of a run; the splits of its steps,
    by the tokens of their rows.

    Raises:
      ValueError: this model, mesh or config cannot be run here.
    """
    config = prepared(complete(config, name="run"), make_model)
    simulate_cpu_devices(config.run.simulated_cpu_devices)
    check_processes(config.distributed)
    mesh = make_mesh(**dataclasses.asdict(config.mesh), axis_type=AxisType.Explicit)
    refuse_mixed_devices(mesh)
    # Of the same device on every process: all must compile one program.
    target = target_of(mesh.devices.flat[0])
    place = partial(place_on, target=target, gpus_per_host=devices_per_host())
    placed = place(config, dict(mesh.shape))
    splits = splits_of(configs_by_length(config, placed, place), mesh)
    refuse_moves(splits, make_model)
    return placed, mesh, splits


def run_once(
    config: Config,
    make_model: MakeModel,
    interrupted: Callable[[], Any] | None,
    *,
    is_last: bool,
) -> Any:
    """`train`, where other runs may come after it.

    Args:
      is_last: none does: to be told to stop in the last step is then no end.
    """
    began = time.time()
    # ---- What to run, and on what. All that can be refused is refused here, before
    # anything is compiled or written.
    config, mesh, splits = on_mesh(config, make_model)
    longest = max(splits)
    own = own_name(config, make_model)
    training = config.training
    data = open_data(config)
    tried: list[str] = []
    if config.memory.auto:
        chosen, tried = choose_memory(splits[longest].config, mesh, make_model)
        config = dataclasses.replace(config, memory=chosen.memory)
        splits = with_memory(splits, chosen.memory)
    check_host_memory(config.memory.offload, mesh.local_devices[0])
    assert config.run.folder is not None
    folder = Path(config.run.folder)
    checkpointer = Checkpointer(
        folder / "checkpoints",
        interval_steps=training.checkpoint_interval_steps,
        keep=training.keep_checkpoints,
    )
    is_main = jax.process_index() == 0
    say = partial(print, flush=True) if is_main else lambda *_: None
    with (
        RunLock(folder) as lock,
        checkpointer,
        WandbRun(config, is_main=is_main) as wandb,
        jax.set_mesh(mesh),
    ):
        shapes = abstract_state(config, make_model)
        steps = Steps(splits, make_model)
        # What a process finds on its own disk, all processes must hear of.
        validates = data.validation is not None and training.validation_batches > 0
        with agreed():
            check_folder(folder)
            wandb.check()
            if validates:
                assert data.validation is not None
                num_rows = training.validation_batches * training.batch_size
                refuse_uncounted(data.validation, num_rows)
            meta = {
                "model": identity(config, make_model),
                "data": data.meta,
                "optimizer": training.optimizer,
                "schedule": schedule_fields(training),
            }
            saved = saved_meta(checkpointer)
            if saved is not None:
                refuse_other_model(saved[1]["model"], meta["model"])
                refuse_other_data(saved[1]["data"], meta["data"], config)
                refuse_other_optimizer(saved[1]["optimizer"], training.optimizer)
            source, before, changed = None, None, []
            if config.model.lora is not None:
                source = open_base(config)
                meta["base"] = fingerprint(source[0])
                if saved is not None:
                    refuse_other_base(saved[1]["base"], meta["base"], config)
            if saved is None and config.run.after is not None:
                before, changed = open_run(config, meta)
            elif (saved, source) == (None, None) and config.model.from_ is not None:
                source = open_source(config.model)
            kept = jax.tree.leaves(shapes.without_frozen())
            sizes = (x.size * x.dtype.itemsize for x in kept)
            check_space(checkpointer.folder, sum(sizes), checkpointer.keep)
        with agreed():
            found = lock.take() if is_main else []
        if own is None:
            traced = steps.traced[longest]
            attention = attention_of(config, platform_of(mesh), traced)
            said = describe(config, shapes, attention)
        else:
            said = describe_own(config, shapes, own)
        if data.by_length is not None:
            said += describe_lengths([each.config for each in splits.values()])
        for line in (*said, *data.notes, *tried, *found, *changed):
            say(line)

        # ---- The state: restored onto this mesh, or drawn from the seed, made sharded.
        restored = checkpointer.restore(shapes.without_frozen(), on_skipped=say)
        if restored is None:
            first_step, changes = 0, []
            state = first_state(config, make_model, source, before)
            whole = None if source is None else config.model.from_
            begun = None if before is None else config.run.after
            if whole and begun:
                say(f"parameters: of {whole}, with the adapters of {begun}")
            elif whole or begun:
                say(f"parameters: of {whole or begun}")
        else:
            first_step, state, then = restored
            check_meta(then, checkpointer.folder / str(first_step))
            if config.model.lora is not None:
                assert isinstance(source, tuple)
                frozen = read_from(config, make_model, source)
                state = dataclasses.replace(state, frozen=frozen)
            say(f"resuming after step {first_step} of {training.num_steps}")
            schedule, taken = then.get("schedule", {}), int(state.step)
            changes = rate_change(schedule, training, first_step, taken)
        owes_validation = (
            validates
            and validates_at(first_step, config)
            and lacks_validation(folder, first_step)
        )
        if first_step >= training.num_steps and not owes_validation:
            say(f"{folder}: nothing left to do; raise --training.num-steps to go on")
            return handed_over(config, state.all_parameters(), make_model)
        for line in changes:
            say(line)

        if config.run.wandb:
            with agreed():
                wandb.start()

        # ---- The step, compiled once; of several lengths the longest here, for what
        # does not fit, and the others when they are first met.
        steps.compile(longest, say)

        # ---- The loop.
        log = RunLog(
            folder,
            num_steps=training.num_steps,
            quiet=config.quiet,
            first_step=first_step,
            is_main=is_main,
            wandb=wandb,
        )
        if is_main:
            (folder / "config.yaml").write_text(config.to_yaml())
            data.tokenizer.copy_to(folder)
        loop = Loop(
            Split(config, mesh),
            splits,
            steps,
            make_model,
            data=data,
            validates=validates,
            state=state,
            first_step=first_step,
            checkpointer=checkpointer,
            meta=meta,
            owes_validation=owes_validation,
            restored={} if restored is None else restored[2],
            log=log,
            interrupted=interrupted,
        )
        del state  # the loop's alone: each step gives it up
        with log:
            log.started(
                began,
                num_devices=mesh.size,
                num_processes=jax.process_count(),
                device_kind=mesh.devices.flat[0].device_kind,
            )
            told = loop.run()
            log.finish()
            if told and (interrupted is None or not is_last):
                raise Stopped(f"{folder} is done, and its last step saved")
        return handed_over(config, loop.state.all_parameters(), make_model)
