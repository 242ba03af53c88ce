"""In-context copying: a sequence of made-up words, then a part of it again, to be gone on with.

What an induction head does (arXiv 2209.11895): find where the last words stood before, and say what came after them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from gda.eval.tasks.settings import CountTokens, as_test_split, read_settings, require_integer, token_counter
from gda.eval.tasks.vocabulary import made_up_words

if TYPE_CHECKING:
    from datasets import Dataset

CUE = 4  # words of the sequence that are given again, and after which the model goes on


@dataclass(frozen=True)
class CopySettings:
    """What decides the sequences.

    Attributes:
        length: Tokens (or words) of the sequence, at most.
        copied: Words that the model is to copy.
        samples: Sequences.
        data_seed: Decides everything random.
    """

    length: int
    copied: int
    samples: int
    data_seed: int

    def __post_init__(self) -> None:
        require_integer("length", self.length, 1)
        require_integer("copied", self.copied, 1)
        require_integer("samples", self.samples, 1)
        require_integer("data_seed", self.data_seed, 0)


def make_documents(settings: CopySettings, count: CountTokens) -> list[dict[str, Any]]:
    """One document a sequence: `text`, the sequence; `prefix`, the cue; `target`, what follows it; and its `place`.

    Raises:
        ValueError: if the length does not hold the cue and the words to be copied.
    """
    return [
        _make_document(settings, count, Random(f"copy {settings.data_seed} {index}"))
        for index in range(settings.samples)
    ]


def _make_document(settings: CopySettings, count: CountTokens, random: Random) -> dict[str, Any]:
    sequence = made_up_words(random, settings.length)  # each takes a token at least
    room, kept = settings.length, 0
    for word in sequence:
        room -= count(f" {word}")
        if room < 0:
            break
        kept += 1
    needed = CUE + settings.copied
    if kept < needed:
        raise ValueError(
            f"`length` {settings.length} holds {kept} words, and {CUE} of cue and {settings.copied} to copy need more"
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


def load(sweep: Mapping[str, Any] | None = None, **metadata: Any) -> "dict[str, Dataset]":
    """The task's data, for lm-eval's `custom_dataset`."""
    return as_test_split(make_documents(read_settings(CopySettings, metadata, sweep), token_counter(metadata)))
