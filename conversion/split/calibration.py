"""The calibration text of a split, as sequences of token ids."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from gda.common.text import python_documentation, read_text

CONTEXT = 512
DEFAULT_TOKENS = 65536
HELD_OUT_SHARE, MAX_HELD_OUT = 0.1, 16  # of the sequences, for measuring the result


@dataclass(frozen=True)
class Calibration:
    """Text that a split is fitted to, and held-out text that it is measured on."""

    name: str  # the file's name, or a description of the text
    sha256: str
    sequences: torch.Tensor  # token ids (sequences, context) to fit to
    held_out: torch.Tensor  # token ids (sequences, context) from the end of the text, which nothing is fitted to

    def to_dict(self) -> dict[str, Any]:
        """What conversion.json records, as JSON-ready values."""
        return {
            "calibration": self.name,
            "sha256": self.sha256,
            "context": self.sequences.shape[1],
            "windows": len(self.sequences),
            "held_out_windows": len(self.held_out),
        }


def read_calibration(
    path: str | Path | None, tokenizer: PreTrainedTokenizerBase, *, tokens: int, longest: int, vocab_size: int
) -> Calibration:
    """Read a text, or Python's own documentation, and cut its first `tokens` into sequences.

    They are at most as long as `longest` and `CONTEXT`. An incomplete last sequence is dropped.

    Raises:
        FileNotFoundError, ValueError: naming the file, and the line if there is one.
    """
    name, text = (
        ("the documentation of Python", python_documentation())
        if path is None
        else read_text(Path(path), "--calibration")
    )
    context = min(CONTEXT, longest)
    if tokens < 2 * context:
        raise ValueError(f"--calibration-tokens {tokens} is below {2 * context}, two sequences of {context} tokens")
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:tokens]
    count = len(ids) // context
    if count < 2:
        raise ValueError(
            f"{name} has {len(ids)} tokens; calibration needs at least {2 * context}, and thousands to work well"
        )
    sequences = torch.tensor(ids[: count * context]).view(count, context)
    if int(sequences.max()) >= vocab_size:
        raise ValueError(f"the tokenizer gives ids up to {sequences.max()}, but the model has {vocab_size} embeddings")
    held_out = max(1, min(MAX_HELD_OUT, round(HELD_OUT_SHARE * count)))
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Calibration(name, digest, sequences[:-held_out].clone(), sequences[-held_out:].clone())
