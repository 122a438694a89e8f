"""A run's folder is known by its files, wherever it is."""

import pytest

from ulysses_jax.run_folder import is_run_folder


@pytest.mark.parametrize(
    "files, found",
    [
        (["config.yaml", "metrics.jsonl", "checkpoints/2/x"], True),
        (["config.yaml", "metrics.jsonl"], True),  # before the first checkpoint
        (["config.yaml", "checkpoints/2/x"], True),  # copied without its rows
        (["config.yaml"], False),
        (["config.yaml", "checkpoints"], False),  # a file of that name
        (["metrics.jsonl", "checkpoints/2/x"], False),
        ([], False),
    ],
)
def test_which_folders_are_a_runs(tmp_path, files, found):
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert is_run_folder(tmp_path) == found
