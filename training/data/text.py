"""Where text for training comes from: files, folders of them, and datasets of the Hub, read piece by piece."""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from gda.common.errors import first_line
from gda.common.text import jsonl_texts, text_pieces
from gda.conversion.sources.hub import LOG_IN

# Those of a folder that are read; a file that is named itself may have any ending.
ENDINGS = (".txt", ".jsonl", ".parquet")
# By which a name that is mistyped is known as that of a file, before the Hub is asked for it again and again.
OTHER_ENDINGS = (".csv", ".gz", ".json", ".md", ".tsv", ".zst")
ROWS_AT_ONCE = 1000
# Text, and whether a document ends with it: one that is a large file comes in many pieces.
Pieces = Iterable[tuple[str, bool]]


class TextSource(Protocol):
    """Something that holds documents."""

    def pieces(self) -> Pieces:
        """The documents in their order, from the beginning.

        Raises:
            ValueError: naming the file or dataset, and the line or row where there is one.
        """

    def identity(self) -> list[Any]:
        """What changes when the content does, as JSON-ready values."""


def find_sources(
    names: Sequence[str | Path], text_field: str, *, streaming: bool, option: str = "--data"
) -> list[TextSource]:
    """What is named: files, folders of files (in the order of their paths), datasets NAME[:CONFIG[:SPLIT]] of the Hub.

    Args:
        names: What to read, in this order.
        text_field: The field of a row that holds its text.
        streaming: Read datasets of the Hub from there, instead of from a copy in its cache.
        option: By which they were named, for errors.

    Raises:
        FileNotFoundError, ValueError, ConnectionError, PermissionError: naming what is not there.
    """
    found: list[TextSource] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            files = sorted(each for each in path.rglob("*") if each.suffix in ENDINGS and each.is_file())
            if not files:
                raise FileNotFoundError(f"{option} {path} is a folder without a file {', '.join(ENDINGS)}")
            found += [_file(each, text_field) for each in files]
        elif path.is_file():
            found.append(_file(path, text_field))
        elif _looks_like_a_path(str(name)):
            raise FileNotFoundError(f"{option} {name} is not a file")
        else:
            found.append(_HubDataset.open(str(name), text_field, streaming, option))
    return found


def _looks_like_a_path(name: str) -> bool:
    repository = name.split(":", 1)[0]
    return (
        not repository
        or os.path.exists(name)  # a pipe, a device
        or name.startswith((".", "/", "~"))
        or repository.count("/") > 1
        or Path(repository).suffix in (*ENDINGS, *OTHER_ENDINGS)
    )


# -------------------------------------------------------------------------------------------------------------- files


def _file(path: Path, text_field: str) -> TextSource:
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    if path.suffix == ".parquet":
        return _Parquet.open(path, text_field)
    return _Jsonl(path, text_field) if path.suffix == ".jsonl" else _Text(path)


def _stamp(path: Path) -> list[Any]:
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


@dataclass(frozen=True)
class _Text:
    """A file that is one document."""

    path: Path

    def pieces(self) -> Pieces:
        for piece in text_pieces(self.path):
            yield piece, False
        yield "", True

    def identity(self) -> list[Any]:
        return _stamp(self.path)


@dataclass(frozen=True)
class _Jsonl:
    """A document a line."""

    path: Path
    field: str

    def pieces(self) -> Pieces:
        return ((text, True) for text in jsonl_texts(self.path, self.field) if text)

    def identity(self) -> list[Any]:
        return _stamp(self.path)


@dataclass(frozen=True)
class _Parquet:
    """A document a row."""

    path: Path
    field: str

    @classmethod
    def open(cls, path: Path, field: str) -> "_Parquet":
        """Look at what the file says of itself.

        Raises:
            ValueError: naming the file and what is wrong with it.
        """
        try:
            schema = pq.read_schema(path)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is no parquet file that can be read: {first_line(error)}") from None
        if field not in schema.names:
            raise ValueError(f"{path} has no column `{field}`, but {', '.join(schema.names)}; name one by --text-field")
        kind = schema.field(field).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise ValueError(f"{path}: column `{field}` holds {kind}, not strings; name another by --text-field")
        return cls(path, field)

    def pieces(self) -> Pieces:
        for row, text in enumerate(self._texts(), 1):
            if text is None:
                raise ValueError(f"{self.path}, row {row} has no text in `{self.field}`, but null")
            if text:
                yield text, True

    def _texts(self) -> Iterator[str | None]:
        with pq.ParquetFile(self.path, page_checksum_verification=True) as file:
            batches = file.iter_batches(batch_size=ROWS_AT_ONCE, columns=[self.field])
            row = 0
            while True:
                try:
                    batch = next(batches, None)
                    texts = None if batch is None else batch.column(0).to_pylist()
                except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                    raise ValueError(f"{self.path} cannot be read after row {row}: {first_line(error)}") from None
                if texts is None:
                    return
                row += len(texts)
                yield from texts

    def identity(self) -> list[Any]:
        return _stamp(self.path)


# ------------------------------------------------------------------------------------------------------------ the Hub


@dataclass(frozen=True)
class _HubDataset:
    """A dataset of the Hub, a document a row."""

    name: str
    field: str
    rows: Any

    @classmethod
    def open(cls, name: str, field: str, streaming: bool, option: str) -> "_HubDataset":
        """Ask the Hub for it, or its cache.

        Raises:
            FileNotFoundError, ValueError, ConnectionError, PermissionError: naming the dataset and what to do.
        """
        from datasets import load_dataset
        from huggingface_hub.errors import HTTPError

        repository, config, split = [*name.split(":", 2), "", ""][:3]
        try:
            with _bars_for_people():
                rows: Any = load_dataset(repository, config or None, split=split or "train", streaming=streaming)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{option} {name} is neither a file nor a dataset that the Hub gives ({first_line(error)}); "
                f"if it is private or gated, {LOG_IN}"
            ) from None
        except (ConnectionError, HTTPError) as error:
            raise ConnectionError(
                f"{option} {name} is no file, and the Hub cannot be reached: {first_line(error)}"
            ) from None
        except Exception as error:  # datasets has no common error for what a repository may hold
            raise ValueError(f"{option} {name} cannot be read: {first_line(error)}") from None
        columns = rows.column_names
        if columns is not None and field not in columns:
            raise ValueError(
                f"{option} {name} has no column `{field}`, but {', '.join(columns)}; name one by --text-field"
            )
        return cls(name, field, rows.select_columns(field))

    def pieces(self) -> Pieces:
        row = 0
        for batch in self.rows.iter(ROWS_AT_ONCE):
            for text in batch[self.field]:
                row += 1
                if not isinstance(text, str):
                    raise ValueError(f"{self.name}, row {row} has no field `{self.field}` that holds a string")
                if text:
                    yield text, True

    def identity(self) -> list[Any]:
        """The revision is part of the place in the cache."""
        return [self.name, len(self.rows), [_stamp(Path(each["filename"])) for each in self.rows.cache_files]]


@contextlib.contextmanager
def _bars_for_people() -> Iterator[None]:
    """Let datasets show its bars on a terminal alone."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
