"""Where documents come from: text files, rows of data files, folders, and datasets on the Hub.

Text and JSON Lines go through `gda.common.text`, as in all commands: it reads a document of any size in pieces, and
its errors name the line. JSON arrays are read whole. Everything else is read by the `datasets` library.
"""

import glob
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pandas
from datasets.packaged_modules.json.json import JsonConfig
from huggingface_hub.errors import HTTPError
from pandas.api.types import is_integer_dtype
from pyarrow.dataset import ParquetFragmentScanOptions

from gda.common.dataset_folders import (
    COMPRESSED,
    LINES,
    READERS,
    data_files,
    ending_of,
    is_saved,
    of_train,
    read_saved,
    split_of,
)
from gda.common.errors import errors_as, first_line
from gda.common.files import stamp_of
from gda.common.places import check_data
from gda.common.text import pieces_from, rows_from, text_pieces
from gda.conversion.sources.hub import LOG_IN
from gda.training.data.rows import SEARCHED, TOOLS, Fields, Piece, Position, Rows, Source, source_of_rows

CHECKED = {"fragment_scan_options": ParquetFragmentScanOptions(page_checksum_verification=True)}
# Ending of plain text in a folder. A file that is named itself may have any ending; it is plain text unless the ending
# is in READERS.
TEXT = ".txt"
END = "end"  # the position after the end of a text
ROWS_AT_ONCE = 1000
NAMED = 3  # files in a note

# The readers log an error and then raise it. It is reported once.
logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)


def find_sources(names: Sequence[str | Path], text_field: str, *, streaming: bool, option: str) -> list[Source]:
    """Find files, folders (of files, or of a dataset) and datasets OWNER/NAME[:CONFIG[:SPLIT]] on the Hub.

    Those of texts come first: sources are packed in this order.
    """
    found: list[Source] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            found += _folder_sources(path, text_field, option)
        elif path.is_file():
            found.append(_file_source(path, text_field))
        else:
            _check_name(str(name), option)
            found.append(_hub_source(str(name), text_field, streaming, option))
    return sorted(found, key=lambda source: source.has_examples)


def _check_name(name: str, option: str) -> None:
    try:
        check_data(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{option} {error}") from None
    if os.path.exists(name):
        raise FileNotFoundError(f"{option} {name} is not a file")


# -------------------------------------------------------------------------------------------------------------- folders


def _folder_sources(folder: Path, text_field: str, option: str) -> list[Source]:
    """The split `train` of a saved dataset, or the files of a folder but for those of other splits."""
    if is_saved(folder):
        splits = read_saved(folder)
        if (rows := splits.get("train", next(iter(splits.values())) if len(splits) == 1 else None)) is None:
            raise ValueError(f"{option} {folder} has no split train; name one of {_listed(folder, splits)}")
        rows = rows.with_format(None)  # which is saved too, and may leave fields out
        identity = [file for each in rows.cache_files for file in _stamp(Path(each["filename"]))]
        return [_table_source(rows, str(folder), identity, text_field, _other_splits(folder, set(splits) - {"train"}))]
    files = data_files(folder, TEXT)
    others = {split for file in files if (split := split_of(file)) not in (None, "train")}
    read = of_train(files)
    if not files:
        raise FileNotFoundError(f"{option} {folder} is a folder without {', '.join((TEXT, *READERS))} files")
    if not read:
        raise ValueError(f"{option} {folder} has no split train, only {', '.join(sorted(others))}; name its files")
    if len(homes := {home for file in read if (home := _home_of_split(file)) is not None}) > 1:
        raise ValueError(
            f"{option} {folder} holds several configurations, each with a split train, in "
            f"{_listed(folder, sorted(map(str, homes)))}; name the folders or files to train on"
        )
    sources = [_file_source(folder / file, text_field) for file in read]
    return [*sources[:-1], replace(sources[-1], note=_other_splits(folder, others, read))]


def _home_of_split(file: Path) -> Path | None:
    """The folder that holds the split of a file, which is one configuration of a dataset; None if it has no split."""
    return next((part.parent for part in (file, *file.parents) if split_of(Path(part.name)) is not None), None)


def _listed(folder: Path, splits: Iterable[str]) -> str:
    return ", ".join(str(folder / split) for split in splits)


def _other_splits(folder: Path, others: set[str], read: Sequence[Path] = ()) -> str | None:
    """A note that only the split `train` is read, if there are others."""
    if not others:
        return None
    names = [*map(str, read[:NAMED]), *([f"and {len(read) - NAMED} more"] if len(read) > NAMED else [])]
    files = f" ({', '.join(names)})" if names else ""
    return f"{folder}: only the split train is read{files}, not {', '.join(sorted(others))}"


# ---------------------------------------------------------------------------------------------------------------- files


def _file_source(path: Path, text_field: str) -> Source:
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    ending, identity = ending_of(path), _stamp(path)
    if ending in LINES and path.suffix.lower() == ending:
        return source_of_rows(str(path), identity, lambda _, start: _lines(path, start), text_field)
    if path.suffix.lower() == ".json" and (read := _json_reader(path)) is not None:
        return source_of_rows(str(path), identity, lambda _, start: read(path, start), text_field)
    if ending in READERS:
        return source_of_rows(str(path), identity, partial(_read, path, ending), text_field)
    if path.suffix.lower() in COMPRESSED:
        raise ValueError(f"{path} is compressed text; decompress it")
    return Source(identity, partial(_text_document, path), has_examples=False)


def _stamp(path: Path) -> list[Any]:
    return [str(path.resolve()), *stamp_of(path)]


def _text_document(path: Path, start: Any) -> Iterator[tuple[Piece, Position]]:
    if start == END:
        return
    for piece, position in pieces_from(path, start):
        yield (piece, False), partial(list, position)
    yield ("", True), lambda: END


def _lines(path: Path, start: Any) -> Rows:
    for number, row, tell in rows_from(path, start):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is not a JSON object, so it has no field `text`")
        yield f"line {number}", row, partial(_line_position, tell, number)


def _json_reader(path: Path) -> Callable[[Path, Any], Rows] | None:
    """The function that reads a file of rows in an array or in lines; None if it has another form, or long lines."""
    beginning = next(text_pieces(path), "").lstrip()
    if beginning.startswith("["):
        return _array
    try:
        json.loads(beginning.split("\n", 1)[0])
    except (ValueError, RecursionError):
        return None
    return _lines


def _array(path: Path, start: Any) -> Rows:
    """The rows of a JSON array. `datasets` would turn fields that differ between rows, such as tools, into text."""
    with errors_as(f"{path} cannot be read"):
        rows = json.loads("".join(text_pieces(path)))
    for number, row in enumerate(rows[start or 0 :], (start or 0) + 1):
        row = {"text": row} if isinstance(row, str) else row
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number} is not a JSON object, so it has no field `text`")
        yield f"row {number}", row, partial(int, number)


def _line_position(tell: Callable[[], int], number: int) -> list[int]:
    return [tell(), number]


def _read(path: Path, ending: str, fields: Fields | None, start: Any) -> Rows:
    """The rows of a data file, or only some fields of them.

    A resumed stream continues at the row group of a Parquet file. Of other files, it reads the part before its position
    again and drops it.
    """
    builder, options = READERS[ending]
    if builder == "parquet":
        options = options | CHECKED
    if ending == ".json" and hasattr(JsonConfig, "on_mixed_types"):  # which turns fields that differ into text
        options = options | {"on_mixed_types": None}
    if builder == "csv":  # otherwise a column of digits would become numbers
        with errors_as(f"{path} cannot be read"):
            header = pandas.read_csv(
                path, nrows=SEARCHED, sep=options.get("sep", ","), on_bad_lines="skip", encoding_errors="replace"
            )
        # pandas takes the fields before those of the header as row names, which only numbers are.
        if len(header) and not is_integer_dtype(header.index):
            raise ValueError(
                f"{path} has rows with more fields than its header; quote text that contains separators, or give the "
                "first column a name"
            )
        options = options | {"features": datasets.Features(dict.fromkeys(header, datasets.Value("string")))}
    load: Callable[..., Any] = partial(
        datasets.load_dataset, builder, data_files=glob.escape(str(path)), split="train", streaming=True, **options
    )
    with errors_as(f"{path} cannot be read"):
        rows = load() if fields is None or builder != "parquet" else load(columns=list(fields))
    if builder == "parquet" and hasattr(rows, "reshard"):  # not in early releases of datasets 4
        rows = rows.reshard()
    return _table_rows(rows, str(path), start)


# ------------------------------------------------------------------------------------------------ tables of `datasets`


def _hub_source(name: str, text_field: str, streaming: bool, option: str) -> Source:
    repository, config, split = [*name.split(":", 2), "", ""][:3]
    if sys.stderr is None or not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        rows: Any = datasets.load_dataset(repository, config or None, split=split or "train", streaming=streaming)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{option} {name} is neither a file nor a dataset on the Hub ({first_line(error)}); "
            f"if it is private or gated, {LOG_IN}"
        ) from None
    except (ConnectionError, HTTPError) as error:
        raise ConnectionError(
            f"{option} {name} is not a file, and the Hub cannot be reached: {first_line(error)}"
        ) from None
    except Exception as error:  # datasets has no common error class
        raise ValueError(f"{option} {name} cannot be read: {first_line(error)}") from None
    # A stream needs no identity, because none of it is stored. The file names of a download contain its revision.
    files = [] if streaming else [len(rows), *(_stamp(Path(each["filename"])) for each in rows.cache_files)]
    return _table_source(rows, name, [name, *files], text_field)


def _table_source(rows: Any, name: str, identity: list[Any], text_field: str, note: str | None = None) -> Source:
    def open_rows(fields: Fields | None, start: Any) -> Rows:
        return _table_rows(rows if fields is None else rows.select_columns(list(fields)), name, start)

    return replace(source_of_rows(name, identity, open_rows, text_field), note=note)


def _table_rows(rows: Any, name: str, start: Any) -> Rows:
    """The rows of a Dataset or an IterableDataset after a position: the number of rows, and the state of the latter."""
    number, state = start or (0, None)
    if isinstance(rows, datasets.Dataset):
        found = _in_batches(rows.skip(number))
    else:
        if state is not None:
            rows.load_state_dict(state)
        found = iter(rows)
    while True:
        try:
            row = next(found, None)
        except Exception as error:  # the readers have no common error class
            raise ValueError(f"{name} cannot be read after row {number}: {first_line(error)}") from None
        if row is None:
            return
        number += 1
        row = {field: _without_nulls(value, also_on_top=field == TOOLS) for field, value in row.items()}
        yield f"row {number}", row, partial(_row_position, number, rows)


def _without_nulls(value: Any, *, also_on_top: bool) -> Any:
    """A value without the null fields that a table adds where only other rows have them.

    Those of messages themselves stay: `content` may be null.
    """
    if isinstance(value, list):
        return [_without_nulls(each, also_on_top=also_on_top) for each in value]
    if not isinstance(value, dict):
        return value
    kept = {name: each for name, each in value.items() if each is not None or not also_on_top}
    return {name: _without_nulls(each, also_on_top=True) for name, each in kept.items()}


def _row_position(number: int, rows: Any) -> list[Any]:
    return [number, None if isinstance(rows, datasets.Dataset) else rows.state_dict()]


def _in_batches(rows: datasets.Dataset) -> Iterator[dict[str, Any]]:
    """The rows, which are read faster in batches."""
    for batch in rows.iter(ROWS_AT_ONCE):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))
