"""Text that a split is fitted to, as windows of token ids."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from gda.common.text import python_documentation, read_text

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
    name, text = (
        ("the documentation of Python", python_documentation())
        if path is None
        else read_text(Path(path), "--calibration")
    )
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
