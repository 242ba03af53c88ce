"""Folders of datasets: as `save_to_disk` of the `datasets` library writes them, and as `hf download` leaves them."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gda.common.errors import errors_as
from gda.common.files import files_below

if TYPE_CHECKING:
    from datasets import Dataset

SAVED_FILES = ("dataset_dict.json", "state.json")  # of a DatasetDict and of a Dataset
SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(-[0-9a-f]+)?")  # older releases of `datasets` add a fingerprint
LINES = (".jsonl", ".ndjson")
# The readers of `datasets`, and their arguments, by the ending of a file, which may be followed by one of COMPRESSED.
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".csv": ("csv", {"keep_default_na": False}),  # the words "NA" and "null" are text
    ".json": ("json", {}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".ndjson": ("json", {}),
    ".arrow": ("arrow", {}),
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` has written the folder."""
    return any((folder / name).is_file() for name in SAVED_FILES)


def read_saved(folder: Path) -> "dict[str, Dataset]":
    """The splits of a dataset that `save_to_disk` has written, mapped into memory; ValueError if it is damaged."""
    from datasets import DatasetDict, load_from_disk

    with errors_as(f"{folder} cannot be read"):
        saved = load_from_disk(str(folder))
    return dict(saved.items()) if isinstance(saved, DatasetDict) else {str(saved.split or "train"): saved}


def ending_of(file: Path) -> str:
    """The ending that says how a file is read, in lower case and without that of a compression."""
    name = Path(file.name.lower())
    return Path(name.stem).suffix if name.suffix in COMPRESSED else name.suffix


def data_files(folder: Path, *endings: str) -> list[Path]:
    """The files in a folder and below it whose rows are read, or that have one of `endings`; paths relative to it."""
    from datasets.data_files import FILES_TO_IGNORE

    files = [path.relative_to(folder) for path in files_below(folder)]
    return [
        file
        for file in files
        if ending_of(file) in (*READERS, *endings)
        and file.name not in FILES_TO_IGNORE
        and not any(part.startswith(".") for part in file.parts)
    ]


def split_in_name(file: Path) -> str:
    """The name of a split as a file spells it, which may be any: NAME.jsonl or NAME-00000-of-00003.parquet."""
    stem = file.name.split(".", 1)[0]
    shard = SHARD.fullmatch(stem)
    return shard[1] if shard else stem


def split_of(file: Path) -> str | None:
    """The split to which a file belongs by a word in its path, which is relative to its dataset; None without one."""
    from datasets.data_files import SPLIT_KEYWORDS

    for part in reversed(file.parts):
        words = re.split(r"[-._ 0-9]+", part.lower())
        for split, known in SPLIT_KEYWORDS.items():
            if any(word in known for word in words):
                return str(split)
    return None


def of_train(files: Iterable[Path]) -> list[Path]:
    """The files that belong to the split `train`, or to none; their paths are relative to their dataset."""
    return [file for file in files if split_of(file) in (None, "train")]
