"""Reading text files, and a text that every installation has."""

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from gda.common.dataset_folders import LINES

# Characters that are read at once. A piece of text has up to three times as many.
BLOCK = 2**16


def python_documentation() -> str:
    """English text that is part of every Python installation."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(path: Path) -> tuple[str, str]:
    """The name and the text of a UTF-8 file. For JSON Lines, the fields `text` of its lines, separated by blank lines.

    Raises:
        ValueError: naming the file, and the line if there is one.
    """
    if path.suffix.lower() in LINES:
        return path.name, "\n\n".join(_jsonl_texts(path))
    return path.name, "".join(text_pieces(path))


def text_pieces(path: Path) -> Iterator[str]:
    """Yield the text of a UTF-8 file in pieces that end at the end of a line, see `BLOCK`.

    A shorter text is one piece. Pieces start with a nonempty line if possible. Line ends become "\\n", and a byte order
    mark is dropped.

    Raises:
        ValueError: naming the file and the byte.
    """
    return (piece for piece, _ in pieces_from(path, None))


def pieces_from(path: Path, position: tuple[int, str] | None) -> Iterator[tuple[str, tuple[int, str]]]:
    """`text_pieces` from a position on: (place in the file, text before it). Each piece has the position after it."""
    offset, held = position or (0, "")
    with _opened(path) as file:
        file.seek(offset)
        while block := file.read(BLOCK):
            held += _without_zeros(path, block)
            if len(held) >= 2 * BLOCK:
                cut = _line_start(held) or len(held)
                piece, held = held[:cut], held[cut:]
                yield piece, (file.tell(), held)
        if held:
            yield held, (file.tell(), "")


def _jsonl_texts(path: Path) -> Iterator[str]:
    """Yield the field `text` of each line of a JSON Lines file; blank lines are skipped."""
    for number, row in jsonl_rows(path):
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise ValueError(f"{path}, line {number} has no field `text` that holds a string")
        require_characters(text, f"{path}, line {number}", "`text`")
        yield text


def require_characters(text: str, where: str, what: str) -> None:
    """Raise ValueError unless UTF-8 can encode the text; `where` says which row, and `what` which part of it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} has half a surrogate pair in {what}, which is not a character") from None


def jsonl_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number, from 1, and the value of each line of a JSON Lines file that is not blank."""
    return ((number, row) for number, row, _ in rows_from(path, None))


def rows_from(path: Path, position: tuple[int, int] | None) -> Iterator[tuple[int, Any, Callable[[], int]]]:
    """`jsonl_rows` after a position: (place in the file, number of the line that ends there).

    The third value of each row is a function that returns the place where the row ends, until the next row is read.
    """
    offset, before = position or (0, 0)
    with _opened(path) as file:
        file.seek(offset)
        for number, line in enumerate(iter(file.readline, ""), before + 1):
            if not _without_zeros(path, line).strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
            yield number, row, file.tell


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """Open a UTF-8 file. Line ends are read as "\\n", and a byte order mark is dropped."""
    with open(path, "rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as file:
        try:
            yield file
        except UnicodeDecodeError as error:
            at = raw.tell() - len(error.object) + error.start
            raise ValueError(f"{path} is not text in UTF-8: {error.reason} at byte {at}") from None


def _without_zeros(path: Path, text: str) -> str:
    if "\0" in text:
        raise ValueError(f"{path} is not text: it has a zero byte")
    return text


def _line_start(text: str) -> int:
    """Start of the last nonempty line; 0 if only the first line is nonempty."""
    end = len(text)
    while (end := text.rfind("\n", 0, end)) > 0:
        if end + 1 < len(text) and not text[end + 1].isspace():
            return end + 1
    return 0
