"""Documents for training: text files, rows of data files and datasets on the Hub.

Text and JSON Lines go through `gda.common.text`, as in all commands: it reads a document of any size in pieces, and
its errors name the line. Everything else is read by the `datasets` library.
"""

import glob
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Value, disable_progress_bars
from huggingface_hub.errors import HTTPError
from pyarrow.dataset import ParquetFragmentScanOptions

from gda.common.errors import first_line
from gda.common.places import check_data
from gda.common.text import jsonl_texts, text_pieces
from gda.conversion.sources.hub import LOG_IN

# Endings of files that are read in a folder. A file that is named itself may have any ending; it is plain text unless
# the ending is .jsonl or in BUILDERS.
FOLDER_ENDINGS = (".txt", ".jsonl", ".parquet", ".csv")
# The readers of `datasets`, and their arguments.
BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".parquet": (
        "parquet",
        {"fragment_scan_options": ParquetFragmentScanOptions(page_checksum_verification=True)},
    ),
    ".csv": ("csv", {"keep_default_na": False}),  # the words "NA" and "null" are text
    ".json": ("json", {}),
}
ROWS_AT_ONCE = 1000

# Text, and whether a document ends with it: a large document comes in several pieces.
Pieces = Iterable[tuple[str, bool]]

# The readers log an error and then raise it. It is reported once.
logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class DocumentSource:
    """A file or a dataset that holds documents.

    `identity` are JSON-ready values that change when the content does. `pieces` reads the documents in order, from the
    beginning.
    """

    identity: list[Any]
    pieces: Callable[[], Pieces]


def find_sources(
    names: Sequence[str | Path], text_field: str, *, streaming: bool, option: str = "--data"
) -> list[DocumentSource]:
    """Find files, folders of files (in the order of their paths) and datasets NAME[:CONFIG[:SPLIT]] on the Hub."""
    found: list[DocumentSource] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            files = sorted(each for each in path.rglob("*") if each.suffix in FOLDER_ENDINGS and each.is_file())
            if not files:
                raise FileNotFoundError(f"{option} {path} is a folder without {', '.join(FOLDER_ENDINGS)} files")
            found += [_file_source(each, text_field) for each in files]
        elif path.is_file():
            found.append(_file_source(path, text_field))
        else:
            _check_name(str(name), option)
            found.append(_hub_source(str(name), text_field, streaming, option))
    return found


def _check_name(name: str, option: str) -> None:
    try:
        check_data(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{option} {error}") from None
    if os.path.exists(name):
        raise FileNotFoundError(f"{option} {name} is not a file")


def _file_source(path: Path, text_field: str) -> DocumentSource:
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    if path.suffix in BUILDERS:
        rows = _open_rows(path, text_field)
        return DocumentSource([*_stamp(path), text_field], partial(_row_documents, rows, str(path), text_field))
    if path.suffix == ".jsonl":
        return DocumentSource([*_stamp(path), text_field], partial(_jsonl_documents, path, text_field))
    return DocumentSource(_stamp(path), partial(_text_document, path))


def _stamp(path: Path) -> list[Any]:
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def _text_document(path: Path) -> Iterator[tuple[str, bool]]:
    for piece in text_pieces(path):
        yield piece, False
    yield "", True


def _jsonl_documents(path: Path, text_field: str) -> Iterator[tuple[str, bool]]:
    return ((text, True) for text in jsonl_texts(path, text_field) if text)


# ---------------------------------------------------------------------------------------------------------------- rows


def _open_rows(path: Path, text_field: str) -> Any:
    """The rows of a data file, as an IterableDataset that reads them when it is iterated over."""
    from datasets import load_dataset

    builder, options = BUILDERS[path.suffix]
    load = partial(load_dataset, builder, data_files=glob.escape(str(path)), split="train", streaming=True, **options)
    try:
        rows: Any = load(columns=[text_field]) if builder == "parquet" else load()
        if rows.column_names == []:
            rows = load()  # raises an error that names the columns
    except Exception as error:  # the readers have no common error class
        raise ValueError(f"{path} cannot be read: {first_line(error)}") from None
    _require_text(rows, str(path), text_field)
    return rows


def _hub_source(name: str, text_field: str, streaming: bool, option: str) -> DocumentSource:
    from datasets import load_dataset

    repository, config, split = [*name.split(":", 2), "", ""][:3]
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        rows: Any = load_dataset(repository, config or None, split=split or "train", streaming=streaming)
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
    _require_text(rows, name, text_field)
    rows = rows.select_columns(text_field)
    # A stream needs no identity, because none of it is stored. The file names of a download contain its revision.
    files = [] if streaming else [len(rows), *(_stamp(Path(each["filename"])) for each in rows.cache_files)]
    return DocumentSource([name, text_field, *files], partial(_row_documents, rows, name, text_field))


def _require_text(rows: Any, name: str, text_field: str) -> None:
    """Refuse rows without the text field, as far as their columns are known before they are read."""
    if rows.column_names is not None and text_field not in rows.column_names:
        raise _no_column(name, text_field, rows.column_names)
    kind = (rows.features or {}).get(text_field)
    if isinstance(kind, Value) and "string" not in kind.dtype:
        raise ValueError(
            f"{name}: column `{text_field}` holds {kind.dtype}, not strings; choose another with --text-field"
        )


def _no_column(name: str, text_field: str, columns: Iterable[str]) -> ValueError:
    return ValueError(
        f"{name} has no column `{text_field}`; choose one of its columns {', '.join(columns)} with --text-field"
    )


def _row_documents(rows: Any, name: str, text_field: str) -> Iterator[tuple[str, bool]]:
    row, batches = 0, rows.iter(ROWS_AT_ONCE)
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:  # the readers have no common error class
            raise ValueError(f"{name} cannot be read after row {row}: {first_line(error)}") from None
        if batch is None:
            return
        if text_field not in batch:
            raise _no_column(name, text_field, batch)
        for text in batch[text_field]:
            row += 1
            if not isinstance(text, str):
                found = "null" if text is None else type(text).__name__
                raise ValueError(f"{name}, row {row}: `{text_field}` holds {found}, not a string")
            if text:
                yield text, True
