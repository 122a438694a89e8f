"""Which folders are a run's, by what lies in them."""

from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path

_MOST_NEAR = 3  # runs that are named instead


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
      ValueError: names the run's folder that it lies in, or those that lie in it or
        near it.
    """
    if (folder / "config.yaml").is_file():
        return
    if (folder / "lock").is_file():
        raise ValueError(
            f"the run in {folder} has taken no step yet: start it again, or wait"
        )
    near = [each for each in folder.parents if is_run_folder(each)][:1]
    near = near or _runs_near(folder)
    remedy = f": give {', or '.join(map(str, near))}" if near else ""
    if not folder.exists():
        raise ValueError(f"{folder} is not there{remedy}")
    raise ValueError(f"{folder} is no run's folder: it has no config.yaml{remedy}")


def _runs_near(folder: Path) -> list[Path]:
    """Those in a folder; else those beside it, or in runs/, whose names are most like
    its name."""
    if folder.is_dir() and (inside := _runs_in(folder)):
        return inside[:_MOST_NEAR]
    there = next((each for each in folder.parents if each.is_dir()), Path())
    runs = {each.name: each for each in (*_runs_in(Path("runs")), *_runs_in(there))}
    close = get_close_matches(folder.name, runs, n=_MOST_NEAR, cutoff=0.6)
    return [runs[name] for name in close or list(runs)[:_MOST_NEAR]]


def _runs_in(folder: Path) -> list[Path]:
    """Runs, and runs in stages."""
    with suppress(OSError):
        return sorted(x for x in folder.iterdir() if is_run_folder(x) or stages_in(x))
    return []
