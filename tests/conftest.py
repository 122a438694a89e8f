"""Eight simulated CPU devices in one process.

No compilation cache on disk: XLA on the CPU (jax 0.10.2) runs collectives of a program
from there in no fixed order, so that devices wait for each other for ever.
"""

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_compilation_cache", False)


@pytest.fixture(scope="session", autouse=True)
def eight_devices():
    assert jax.device_count() == 8
