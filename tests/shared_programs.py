"""Programs that a file's runs compile once: import the fixture to have it."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import pytest

from ulysses_jax.config import Data, Distributed, Run
from ulysses_jax.training import by_length, loop, run
from ulysses_jax.training.state import abstract_state, init_state
from ulysses_jax.training.step import (
    abstract_batch,
    jit_train_step,
    make_validation_step,
)


@pytest.fixture(scope="module", autouse=True)
def shared_programs():
    """Runs alike in mesh, model and training share their compiled programs."""

    @functools.cache
    def step(config, platform, make_model):
        traced = jit_train_step(config, platform, make_model).trace(
            abstract_state(config, make_model), abstract_batch(config)
        )
        # A run that is refused for its folder compiles nothing.
        compiled = functools.cache(lambda: traced.lower().compile())
        again = SimpleNamespace(jaxpr=traced.jaxpr, compile=compiled)
        again.trace, again.lower = lambda *_: again, lambda: again
        return again

    @functools.cache
    def state(config, make_model):
        init = functools.partial(init_state, config, make_model)
        return jax.jit(init).lower().compile()

    validation = functools.cache(make_validation_step)

    def alike(config):
        """But for what a program does not depend on."""
        return dataclasses.replace(
            config,
            run=Run(seed=config.run.seed),
            data=Data(mask_documents=config.data.mask_documents),
            training=dataclasses.replace(
                config.training,
                validation_interval_steps=0,
                validation_batches=0,
                checkpoint_interval_steps=1,
            ),
            distributed=Distributed(),
            quiet=False,
            profile=(),
        )

    with pytest.MonkeyPatch.context() as patched:
        for module, name, program in (
            (by_length, "jit_train_step", step),
            (run, "first_state", lambda config, make, *_: state(config, make)()),
            (loop, "make_validation_step", validation),
        ):
            patched.setattr(
                module,
                name,
                lambda config, *args, program=program: program(alike(config), *args),
            )
        yield
