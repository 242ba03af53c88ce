"""Datasets of lm-eval's tasks from local files instead of the Hub. Nothing else of a task changes."""

import contextlib
import glob
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
from huggingface_hub import DatasetCard

from gda.common.dataset_folders import READERS, data_files, ending_of, is_saved, read_saved, split_in_name, split_of
from gda.common.errors import errors_as, first_line
from gda.common.progress import log_level
from gda.common.text import jsonl_rows

SUFFIXES = (".jsonl", ".parquet")
OF_THE_HUB = ("split", "revision", "token", "trust_remote_code", "cache_dir")  # arguments that no file needs
# A task with one of these as dataset_path names its files itself.
FILE_FORMATS = ("arrow", "csv", "json", "pandas", "parquet", "text", "xml")


class LocalSplits(datasets.DatasetDict):
    """The splits of a dataset in a folder, by the names of its files.

    Another split is that of the files with a word for it in their paths, as in `gda train`: validation is in dev.jsonl,
    for example. Asking for one that is not there names the missing file.
    """

    folder: Path

    def __missing__(self, split: str) -> Any:
        if parts := [rows for name, rows in self.items() if split_of(Path(name)) == split]:
            self[split] = datasets.concatenate_datasets(parts)  # one object, by which processed documents are kept
            return self[split]
        raise FileNotFoundError(f"{self.folder / split}{SUFFIXES[0]} (or {SUFFIXES[1]}) is missing")


@contextlib.contextmanager
def data_from(root: str | Path | None) -> Iterator[list[Path]]:
    """Within this context, tasks read their datasets from `root`.

    A dataset is in `root`/dataset_path, see `load_local`. With None, tasks read their usual datasets, and an error
    names the one that is missing. The context yields the list of folders read so far.
    """
    original = datasets.load_dataset
    folders_read: list[Path] = []

    def load_dataset(path: str, name: str | None = None, *args: Any, **kwargs: Any) -> Any:
        if root is not None and path not in FILE_FORMATS:
            folders_read.append(Path(root) / path / (name or ""))
            if kwargs.get("data_files") or kwargs.get("data_dir"):
                return _named_files(Path(root), path, name, kwargs)
            return load_local(Path(root), path, name, kwargs.get("split"))
        try:
            # The hub's client logs each attempt to reach it; the error after the last one says enough.
            with log_level("huggingface_hub", logging.ERROR):
                return original(path, name, *args, **kwargs)
        except Exception as error:  # datasets has no common error class
            dataset = path if name is None else f"{path} ({name})"
            folder = f"DIR/{path}/{name}" if name else f"DIR/{path}"
            remedy = f"; to read it from {folder}/SPLIT.jsonl, pass --dataset-root DIR"
            if path in FILE_FORMATS:
                remedy = f" (its definition names files: {kwargs.get('data_files') or kwargs.get('data_dir')})"
            raise FileNotFoundError(f"its dataset {dataset} cannot be loaded: {first_line(error)}{remedy}") from None

    datasets.load_dataset = load_dataset  # the name by which lm-eval calls it
    try:
        yield folders_read
    finally:
        datasets.load_dataset = original


def load_local(root: Path, path: str, name: str | None, split: str | None = None) -> Any:
    """The dataset `path`, configuration `name`, from its folder under `root`.

    Its splits are the files that the dataset's README.md lists. Without such a list, they are files in
    dataset_path/dataset_name that are named by them, in one or more shards, or what `save_to_disk` has written.
    """
    base = root / path
    folder = base / (name or "")
    places = [folder] if name not in (None, "default") else [base, base / "default", base / "data"]
    found = None
    if _lists_files(base / "README.md", name):
        with contextlib.suppress(FileNotFoundError):  # not all of them were downloaded
            found = datasets.load.load_dataset(str(base), name)
    found = found or next((splits for place in places if (splits := _splits_in(place))), None)
    if found is None and (base / "README.md").is_file():
        try:
            found = datasets.load.load_dataset(str(base), name)
        except Exception as error:  # datasets has no common error class
            raise FileNotFoundError(f"{base} holds no dataset {name or ''}: {first_line(error)}") from None
    if found is None:
        raise FileNotFoundError(f"{folder} holds no data files; put SPLIT{SUFFIXES[0]} or SPLIT{SUFFIXES[1]} there")
    splits = LocalSplits(found)
    splits.folder = folder
    return splits if split is None else splits[split]


def _named_files(root: Path, path: str, name: str | None, settings: dict[str, Any]) -> Any:
    """The files of a dataset in its folder that a task's definition names, and reads by the `settings`.

    Without them, what `load_local` finds if the task names a configuration or the folder is a saved dataset: other
    files may be of other tasks.
    """
    base, split = root / path, settings.get("split")
    files = " and ".join(str(settings[each]) for each in ("data_files", "data_dir") if settings.get(each))
    if not base.is_dir():
        raise FileNotFoundError(f"{base} is missing; the task reads {files} there")
    if is_saved(base) or (name is not None and (base / name).is_dir()):
        return load_local(root, path, name, split)
    of_reader = {key: value for key, value in settings.items() if key not in OF_THE_HUB}
    try:
        splits = LocalSplits(datasets.load.load_dataset(str(base.absolute()), name, **of_reader))
    except FileNotFoundError:
        raise FileNotFoundError(f"{base} lacks {files}, which the task reads") from None
    except Exception as error:  # datasets has no common error class
        raise ValueError(f"{base} cannot be read: {first_line(error)}") from None
    splits.folder = base
    return splits if split is None else splits[split]


def _lists_files(readme: Path, name: str | None) -> bool:
    """Whether a dataset's README.md lists the files of the configuration `name`; None is the default one."""
    with errors_as(f"{readme} cannot be read"):
        configs = DatasetCard.load(readme).data.get("configs") if readme.is_file() else None
    return any(
        "data_files" in each and each.get("config_name", "default") == (name or "default") for each in configs or ()
    )


def _splits_in(folder: Path) -> dict[str, datasets.Dataset]:
    """The splits in a folder; none if it holds no data.

    Files in folders below it count if those are named by a split. JSON Lines and Parquet are preferred, because files
    with other endings may be something else.
    """
    if is_saved(folder):
        return read_saved(folder)
    files = [file for file in data_files(folder) if len(file.parts) == 1 or split_of(file.parent)]
    files = [file for file in files if len(file.parts) == 1] or files
    shards: dict[str, list[datasets.Dataset]] = {}
    for file in [file for file in files if file.suffix in SUFFIXES] or files:
        shards.setdefault(str(file.with_name(split_in_name(file))), []).append(_read(folder / file))
    return {split: datasets.concatenate_datasets(parts) for split, parts in shards.items()}


def _read(path: Path) -> datasets.Dataset:
    """The rows of a file, in memory. (datasets' own readers keep copies in the home folder and guess at types.)"""
    with errors_as(f"{path} cannot be read", pyarrow.ArrowException):
        if path.suffix == ".parquet":
            dataset = datasets.Dataset(pyarrow.parquet.read_table(path))
        else:
            dataset = _read_jsonl(path) if path.suffix == ".jsonl" else _read_other(path)
    if not len(dataset):
        raise ValueError(f"{path} is empty")
    return dataset


def _read_other(path: Path) -> datasets.Dataset:
    builder, options = READERS[ending_of(path)]
    with errors_as(f"{path} cannot be read"):
        rows = datasets.load.load_dataset(
            builder, data_files=glob.escape(str(path)), split="train", streaming=True, **options
        )
        return datasets.Dataset.from_list(list(rows))


def _read_jsonl(path: Path) -> datasets.Dataset:
    rows = []
    for number, row in jsonl_rows(path):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is not a JSON object")
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)  # from_list takes those of the first row only
    return datasets.Dataset.from_list([{name: row.get(name) for name in names} for row in rows])
