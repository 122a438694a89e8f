"""Folders that `datasets` saved: which of their files are the documents."""

from pathlib import Path, PurePath

from ulysses_jax.outside import read_object


def of_datasets(named: dict[str, Path]) -> tuple[dict[str, Path], list[str]]:
    """The files of a corpus; of folders by `save_to_disk` those that state.json lists.

    Returns:
      The files by name, and the names of others that lie beside them.

    Raises:
      ValueError: a file that is listed and not there; a folder of several splits.
    """
    kept, others = dict(named), []
    for name, path in named.items():
        if path.name == "dataset_dict.json":
            splits = _read(path).get("splits")
            if isinstance(splits, list) and splits and _are_text(splits):
                raise ValueError(
                    f"{path.parent} holds the splits {', '.join(splits)} of a dataset: "
                    f"give one of them, such as {path.parent}/{splits[0]}"
                )
            raise ValueError(
                f"{path} names no splits, a list of names: give the folder of one, or "
                "save the dataset again"
            )
        folder = PurePath(name).parent
        if path.name != "state.json" or str(folder / "dataset_info.json") not in named:
            continue
        listed = [str(folder / each) for each in _data_files(path)]
        missing = [each for each in listed if each not in named]
        if missing:
            raise ValueError(
                f"{path} lists {', '.join(missing[:3])}, which is not "
                "there: save the dataset again"
            )
        beside = [each for each in named if PurePath(each).parent == folder]
        for each in beside:
            if each not in listed:
                del kept[each]
        about = ("state.json", "dataset_info.json")
        others += [
            each
            for each in beside
            if each not in listed and PurePath(each).name not in about
        ]
    return kept, others


def _are_text(values: list) -> bool:
    return all(isinstance(each, str) for each in values)


def _data_files(path: Path) -> list[str]:
    files = _read(path).get("_data_files")
    if isinstance(files, list) and all(
        isinstance(each, dict) and isinstance(each.get("filename"), str)
        for each in files
    ):
        return [each["filename"] for each in files]
    raise ValueError(f"{path} lists no files of a dataset: save it again")


def _read(path: Path) -> dict:
    try:
        return read_object(path)
    except ValueError as error:
        raise ValueError(f"{error}: save the dataset again") from None
