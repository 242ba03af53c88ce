"""Folders of datasets: as `save_to_disk` of the `datasets` library writes them, and as `hf download` leaves them."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from gda.common.errors import first_line

if TYPE_CHECKING:
    from datasets import Dataset

SAVED_FILES = ("dataset_dict.json", "state.json")  # of a DatasetDict and of a Dataset
# Words in the names of files and folders by which `datasets` recognizes splits.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` has written the folder."""
    return any((folder / name).is_file() for name in SAVED_FILES)


def read_saved(folder: Path) -> "dict[str, Dataset]":
    """The splits of a dataset that `save_to_disk` has written, mapped into memory; ValueError if it is damaged."""
    from datasets import DatasetDict, load_from_disk

    try:
        saved = load_from_disk(str(folder))
    except Exception as error:  # datasets has no common error class
        raise ValueError(f"{folder} cannot be read: {first_line(error)}") from None
    return dict(saved.items()) if isinstance(saved, DatasetDict) else {str(saved.split or "train"): saved}


def split_in_name(file: Path) -> str:
    """The split by which a file is named: NAME.jsonl or NAME-00000-of-00003.parquet."""
    stem = file.name.split(".", 1)[0]
    shard = SHARD.fullmatch(stem)
    return shard[1] if shard else stem


def split_of(file: Path) -> str | None:
    """The split to which a file belongs by a word in its path, which is relative to its dataset; None without one."""
    for part in reversed(file.parts):
        words = re.split(r"[-._ 0-9]+", part.lower())
        for split, known in SPLIT_WORDS.items():
            if any(word in known for word in words):
                return split
    return None
