"""Text that is at hand everywhere. A leaf module: it imports nothing of the project."""

import json
from pathlib import Path


def python_documentation() -> str:
    """English text that every Python carries."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(path: Path, option: str) -> tuple[str, str]:
    """The name and the text of a file in UTF-8; of a `.jsonl`, the fields `text` of its lines, parted by blank lines.

    Args:
        path: The file.
        option: By which it was named, for errors.

    Raises:
        FileNotFoundError, ValueError: naming the file, and the line where there is one.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{option} {path} is not a file")
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error.reason} at byte {error.start}") from None
    if path.suffix == ".jsonl":
        # Not by splitlines: it also parts at characters that a JSON string may hold, such as U+2028.
        lines = enumerate(text.split("\n"), 1)
        text = "\n\n".join(_text_of(path, number, line) for number, line in lines if line.strip())
    return path.name, text


def _text_of(path: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ValueError(f"{path}, line {number} has no field `text` that holds a string")
    text = str(row["text"])
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{path}, line {number} has half a surrogate pair in `text`, which is no character") from None
    return text
