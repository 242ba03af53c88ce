"""Reading text files, and a text that every installation has."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path

BLOCK = 2**20


def python_documentation() -> str:
    """English text that is part of every Python installation."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(path: Path, option: str) -> tuple[str, str]:
    """The name and the text of a UTF-8 file. For `.jsonl`, the fields `text` of its lines, separated by blank lines.

    Errors name the file and its `option`, and the line if there is one.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{option} {path} is not a file")
    if path.suffix == ".jsonl":
        return path.name, "\n\n".join(jsonl_texts(path, "text"))
    return path.name, "".join(text_pieces(path))


def text_pieces(path: Path) -> Iterator[str]:
    """Yield the text of a UTF-8 file in pieces of about a million characters that end at the end of a line.

    A shorter text is one piece. Pieces start with a nonempty line if possible. Line ends become "\\n", and a byte order
    mark is dropped.

    Raises:
        ValueError: naming the file and the byte.
    """
    held = ""
    for block in _blocks(path):
        held += block
        if len(held) >= 2 * BLOCK:
            cut = _line_start(held) or len(held)
            yield held[:cut]
            held = held[cut:]
    if held:
        yield held


def jsonl_texts(path: Path, field: str) -> Iterator[str]:
    """Yield the value of `field` in each line of a JSON Lines file; blank lines are skipped."""
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            yield _text_of(path, number, line, field)


def _lines(path: Path) -> Iterator[str]:
    """Lines without their ends. str.splitlines also splits at U+2028 and others, which JSON strings may contain."""
    held: list[str] = []
    for block in _blocks(path):
        first, *others = block.split("\n")
        held.append(first)
        for other in others:
            yield "".join(held)
            held = [other]
    yield "".join(held)


def _blocks(path: Path) -> Iterator[str]:
    """The text of a file in blocks of about a million bytes: it may be larger than memory."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done, carriage_return = 0, ""
    with open(path, "rb") as file:
        while True:
            block = file.read(BLOCK)
            start = done - len(decoder.getstate()[0])  # minus the part of a character at the end of the previous block
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not text in UTF-8: {error.reason} at byte {start + error.start}") from None
            if "\0" in text:
                at = start + len(text[: text.index("\0")].encode())
                raise ValueError(f"{path} is not text: it has a zero byte at byte {at}")
            if start == 0:
                text = text.removeprefix("\ufeff")  # some editors write a byte order mark
            text = carriage_return + text
            carriage_return = "\r" if block and text.endswith("\r") else ""
            yield text.removesuffix(carriage_return).replace("\r\n", "\n").replace("\r", "\n")
            if not block:
                return
            done += len(block)


def _line_start(text: str) -> int:
    """Start of the last nonempty line; 0 if only the first line is nonempty."""
    end = len(text)
    while (end := text.rfind("\n", 0, end)) > 0:
        if end + 1 < len(text) and not text[end + 1].isspace():
            return end + 1
    return 0


def _text_of(path: Path, number: int, line: str, field: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        raise ValueError(f"{path}, line {number} has no field `{field}` that holds a string")
    text = str(row[field])
    try:
        text.encode()
    except UnicodeEncodeError:
        message = f"{path}, line {number} has half a surrogate pair in `{field}`, which is not a character"
        raise ValueError(message) from None
    return text
