"""The texts of a split, as sequences of token ids: those that it is fitted to, and those that it is measured on."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from gda.common.text import python_documentation, read_text
from gda.conversion.split.rows import SHORT

CONTEXT = 512
HELD_OUT_TOKENS = 4096  # of each text, for measuring the result
SAMPLED_TEXT, PYTHON = "text sampled from the source", "the documentation of Python"


@dataclass(frozen=True)
class Text:
    """One text, as token ids (sequences, context)."""

    name: str  # the file's name, or a description of the text
    sha256: str
    sequences: torch.Tensor  # to fit to; none if the result is only measured on this text
    held_out: torch.Tensor  # for measuring; nothing is fitted to them

    def to_dict(self) -> dict[str, Any]:
        """What conversion.json records, as JSON-ready values."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "sequences": len(self.sequences),
            "held_out_sequences": len(self.held_out),
        }


@dataclass(frozen=True)
class Shares:
    """How many sequences, of how many tokens, each text gives."""

    context: int
    files: dict[Path, int]
    sampled: int  # sequences that the source writes, besides those that are held out
    beginnings: list[list[int]]  # token ids that plain text begins with, in turn

    @property
    def held_out(self) -> int:
        """How many sequences of a text are held out if it has them."""
        return -(-HELD_OUT_TOKENS // self.context)


def shares(
    weights: Mapping[str, float], *, sampled: float, tokens: int, longest: int, beginnings: list[list[int]]
) -> Shares:
    """Divide `tokens` among files, by path, and the text that is sampled, in proportion to their weights.

    Sequences are at most as long as `longest` and `CONTEXT`, and consist of whole short ones.

    Raises:
        ValueError: if the tokens are too few for a sequence of each text, or `longest` is too short.
    """
    context, total = min(CONTEXT, longest) // SHORT * SHORT, sum(weights.values()) + sampled
    if not context:
        raise ValueError(f"the source reads {longest} tokens at a time, and --mode split needs {SHORT}")
    texts = len(weights) + (sampled > 0)
    if tokens < texts * context:
        raise ValueError(
            f"--calibration-tokens {tokens} is below {texts * context}: each text needs a sequence of {context} tokens"
        )
    counts = {Path(name): max(1, round(weight / total * tokens / context)) for name, weight in weights.items()}
    written = max(1, round(sampled / total * tokens / context)) if sampled else 0
    return Shares(context, counts, written, beginnings)


def read_calibration(path: Path, tokenizer: PreTrainedTokenizerBase, shares: Shares) -> Text:
    """A file's share of the sequences from its beginning, and those after them as held-out text.

    A file that is too short for both keeps a tenth of its sequences for measuring. An incomplete last sequence is
    dropped.

    Raises:
        FileNotFoundError, ValueError: naming the file, and the line if there is one.
    """
    name, text = read_text(path)
    sequences = _cut(text, tokenizer, shares)
    if len(sequences) < 2:
        count, needed = len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids), 2 * shares.context
        raise ValueError(f"{name} has {count} tokens; calibration needs at least {needed}, and thousands to work well")
    fitted = min(shares.files[path], len(sequences) - min(shares.held_out, max(1, len(sequences) // 10)))
    return Text(name, _digest(text), sequences[:fitted], sequences[fitted : fitted + shares.held_out])


def documentation(tokenizer: PreTrainedTokenizerBase, shares: Shares) -> list[Text]:
    """Sequences from all over Python's own documentation, for measuring; none if the tokenizer knows no word of it."""
    text = python_documentation()
    sequences = _cut(text, tokenizer, shares)
    if not len(sequences):
        return []
    spread = torch.linspace(0, len(sequences) - 1, min(shares.held_out, len(sequences))).long()
    return [Text(PYTHON, _digest(text), sequences[:0], sequences[spread])]


def sampled_text(ids: torch.Tensor, shares: Shares) -> Text:
    """Token ids (sequences, context) that the source has written; the last are held out."""
    digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    return Text(SAMPLED_TEXT, digest, ids[: shares.sampled], ids[shares.sampled :])


def text_beginnings(tokenizer: PreTrainedTokenizerBase, embeddings: int) -> list[list[int]]:
    """What plain text begins with: BOS if the tokenizer adds it; otherwise in turn nothing and BOS, or EOS without one.

    Programs put it before text that the tokenizer leaves without, for example lm-evaluation-harness.
    """
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first is None or first >= embeddings:
        return [[]]
    return [[first]] if tokenizer("a").input_ids[:1] == [first] else [[], [first]]


def begin(sequences: torch.Tensor, beginnings: list[list[int]]) -> None:
    """Put the beginnings in turn in the place of the first tokens of sequences (sequences, T)."""
    for turn, beginning in enumerate(beginnings):
        sequences[turn :: len(beginnings), : len(beginning)] = torch.tensor(beginning, dtype=torch.long)


def _cut(text: str, tokenizer: PreTrainedTokenizerBase, shares: Shares) -> torch.Tensor:
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    sequences = torch.tensor(ids[: len(ids) // shares.context * shares.context], dtype=torch.long)
    sequences = sequences.view(-1, shares.context)
    begin(sequences, shares.beginnings)
    return sequences


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
