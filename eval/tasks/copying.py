"""In-context copying: a sequence of made-up words, then a few of them again, which the model must continue.

This is what an induction head does (arXiv 2209.11895): find the earlier occurrence and repeat what followed it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from gda.eval.tasks.settings import CountTokens, as_test_split, read_settings, require_integer, token_counter
from gda.eval.tasks.vocabulary import made_up_words

CUE = 4  # words that are repeated for the model to continue


@dataclass(frozen=True)
class CopySettings:
    """Settings of the sequences."""

    length: int  # of a sequence at most, in tokens (or words)
    copied: int  # number of words to copy
    samples: int  # number of sequences
    data_seed: int

    def __post_init__(self) -> None:
        require_integer("length", self.length, 1)
        require_integer("copied", self.copied, 1)
        require_integer("samples", self.samples, 1)
        require_integer("data_seed", self.data_seed, 0)


def make_documents(settings: CopySettings, count: CountTokens) -> list[dict[str, Any]]:
    """One document per sequence: `text`, the sequence; `prefix`, the cue; `target`, what follows; its `place`."""
    return [
        _make_document(settings, count, Random(f"copy {settings.data_seed} {index}"))
        for index in range(settings.samples)
    ]


def _make_document(settings: CopySettings, count: CountTokens, random: Random) -> dict[str, Any]:
    sequence = made_up_words(random, settings.length)  # each takes at least one token
    left, kept = settings.length, 0
    for word in sequence:
        left -= count(f" {word}")
        if left < 0:
            break
        kept += 1
    needed = CUE + settings.copied
    if kept < needed:
        raise ValueError(
            f"`length` {settings.length} holds {kept} words, too few for a cue of {CUE} and {settings.copied} to copy"
        )
    sequence = sequence[:kept]
    start = random.randrange(kept - needed + 1)
    cue, copied = sequence[start : start + CUE], sequence[start + CUE : start + needed]
    return {
        "text": f"{' '.join(sequence)}\n",
        "prefix": " ".join(cue),
        "target": f" {' '.join(copied)}",
        "place": start / kept,
    }


def load(sweep: Mapping[str, Any] | None = None, **metadata: Any) -> dict[str, Any]:
    """The data of the task (lm-eval's `custom_dataset`)."""
    return as_test_split(make_documents(read_settings(CopySettings, metadata, sweep), token_counter(metadata)))
