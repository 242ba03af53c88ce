"""Text that a split is fitted to, as windows of token ids."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from gda._text import python_documentation

CONTEXT = 512
DEFAULT_TOKENS = 65536
# Of the windows, those that nothing is fitted to, by which the result is judged: a tenth, and at most this many.
HELD_OUT_SHARE, MOST_HELD_OUT = 0.1, 16


@dataclass(frozen=True)
class Calibration:
    """What a split reads.

    Attributes:
        name: Of the file, or what the text is.
        sha256: Of the text.
        windows: Ids (windows, context) that are fitted to.
        held_out: Ids (windows, context) from the end of the text, which are not.
    """

    name: str
    sha256: str
    windows: torch.Tensor
    held_out: torch.Tensor

    def to_dict(self) -> dict[str, Any]:
        """What there is to say of it, as JSON-ready values."""
        return {
            "calibration": self.name,
            "sha256": self.sha256,
            "context": self.windows.shape[1],
            "windows": len(self.windows),
            "held_out_windows": len(self.held_out),
        }


def read_calibration(
    path: str | Path | None, tokenizer: PreTrainedTokenizerBase | None, *, tokens: int, longest: int, vocab_size: int
) -> Calibration:
    """Read a text, or Python's own documentation where `path` is None, and cut it into windows.

    Args:
        path: A text file, or `.jsonl` with a field `text` in each line.
        tokenizer: The model's.
        tokens: How many to read at most; as many whole windows as they fill.
        longest: The longest sequence that the model was made for.
        vocab_size: Of the model.

    Raises:
        FileNotFoundError, ValueError: naming the file, and the line where there is one.
    """
    if tokenizer is None:
        raise ValueError("--mode split reads text, and the source has no tokenizer; --mode expand needs none")
    name, text = ("the documentation of Python", python_documentation()) if path is None else _read_text(Path(path))
    context = min(CONTEXT, longest)
    if tokens < 2 * context:
        raise ValueError(f"--calibration-tokens {tokens} is below {2 * context}, two windows of {context} tokens")
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:tokens]
    count = len(ids) // context
    if count < 2:
        raise ValueError(f"{name} has {len(ids)} tokens; calibration needs {2 * context}, and thousands to be any good")
    windows = torch.tensor(ids[: count * context]).view(count, context)
    if int(windows.max()) >= vocab_size:
        raise ValueError(f"the tokenizer gives ids up to {windows.max()}, and the model has {vocab_size} embeddings")
    held_out = max(1, min(MOST_HELD_OUT, round(HELD_OUT_SHARE * count)))
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Calibration(name, digest, windows[:-held_out].clone(), windows[-held_out:].clone())


def _read_text(path: Path) -> tuple[str, str]:
    if not path.is_file():
        raise FileNotFoundError(f"--calibration {path} is not a file")
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
