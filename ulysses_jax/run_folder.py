"""Which folders are a run's, by what lies in them."""

from pathlib import Path


def is_run_folder(folder: Path) -> bool:
    """Whether a run wrote its config and something else into the folder."""
    wrote = (folder / "metrics.jsonl").is_file() or (folder / "checkpoints").is_dir()
    return wrote and (folder / "config.yaml").is_file()
