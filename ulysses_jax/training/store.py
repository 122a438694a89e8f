"""The keys and values that all processes of a pod see, from when they have started."""

from typing import Any

import jax
from jax._src import distributed  # none of it has a public door


def this_process() -> int:
    """Its number, as `jax.process_index()`, which would make JAX choose its devices."""
    return distributed.global_state.process_id


def num_processes() -> int:
    return distributed.global_state.num_processes


def coordinator() -> tuple[str, int]:
    """The host and the port of process 0, which keeps the store."""
    host, port = str(distributed.global_state.coordinator_address).rsplit(":", 1)
    return host.strip("[]"), int(port)


def set_once(key: str, value: str) -> bool:
    """Whether this process was the first to set it; not where the store is gone."""
    try:
        _client().key_value_set(key, value)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def set_again(key: str, value: str) -> None:
    """Sets it, whatever it was.

    Raises:
      JaxRuntimeError: the store is gone, and so is process 0.
    """
    _client().key_value_set(key, value, allow_overwrite=True)


def get(key: str) -> str | None:
    """Its value, or None where nobody has set it; also where the store is gone."""
    try:
        return _client().key_value_try_get(key)
    except jax.errors.JaxRuntimeError:
        return None


def wait(key: str, seconds: float) -> str:
    """Its value, when somebody has set it.

    Raises:
      JaxRuntimeError: nobody has, in so long.
    """
    return _client().blocking_key_value_get(key, int(1000 * seconds))


def get_all(folder: str) -> dict[int, str]:
    """Of keys `folder`/process, by the process; none where the store is gone."""
    try:
        found = _client().key_value_dir_get(f"{folder}/")
    except jax.errors.JaxRuntimeError:
        return {}
    return {int(key.rsplit("/", 1)[1]): value for key, value in found}


def _client() -> Any:
    return distributed.global_state.client
