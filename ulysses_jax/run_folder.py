"""Which folders are a run's, by what lies in them."""

from pathlib import Path


def is_run_folder(folder: Path) -> bool:
    """Whether a run wrote its config and something else into the folder."""
    wrote = (folder / "metrics.jsonl").is_file() or (folder / "checkpoints").is_dir()
    return wrote and (folder / "config.yaml").is_file()


def stages_in(folder: Path) -> list[Path]:
    """The runs of a run in stages, of those stages that have begun."""
    return sorted(each for each in folder.glob("stage_*") if is_run_folder(each))


def check_run_folder(folder: Path) -> None:
    """Refuses a folder that is no run's.

    Raises:
      ValueError: names the run's folder that it lies in, or those that lie in it.
    """
    if (folder / "config.yaml").is_file():
        return
    if (folder / "lock").is_file():
        raise ValueError(
            f"the run in {folder} has taken no step yet: start it again, or wait"
        )
    near = [each for each in folder.parents if is_run_folder(each)][:1]
    near += stages_in(folder)
    remedy = f": give {', or '.join(map(str, near))}" if near else ""
    raise ValueError(f"{folder} is no run's folder: it has no config.yaml{remedy}")
