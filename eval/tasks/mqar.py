"""Multi-query associative recall, MQAR (arXiv 2312.04927), in words that any tokenizer can spell.

A list of pairs of key and value is followed by some of the keys in another order, and the model must give the value of
each. Keys are made-up words, so only the list determines their values.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from gda.eval.tasks.settings import as_test_split, read_settings, require_integer
from gda.eval.tasks.vocabulary import made_up_words


@dataclass(frozen=True)
class MQARSettings:
    """Settings of the sequences."""

    pairs: int  # number of pairs in a sequence, which is its length
    queries: int  # number of keys asked for in a sequence, each after the answers to the earlier ones
    samples: int  # number of sequences
    data_seed: int

    def __post_init__(self) -> None:
        require_integer("pairs", self.pairs, 1)
        require_integer("queries", self.queries, 1)
        require_integer("samples", self.samples, 1)
        require_integer("data_seed", self.data_seed, 0)


def make_documents(settings: MQARSettings) -> list[dict[str, Any]]:
    """One document per query: `text`, the list; `prefix`, which ends with the key asked for; `target`, its value.

    If there are fewer pairs than queries, every key is asked for once.
    """
    documents = []
    for index in range(settings.samples):
        random = Random(f"mqar {settings.data_seed} {index}")
        keys = made_up_words(random, settings.pairs)
        values = [str(random.randrange(10, 100)) for _ in keys]
        pairs = [f"{key} {value}" for key, value in zip(keys, values, strict=True)]
        answered = ""
        for asked in random.sample(range(settings.pairs), min(settings.queries, settings.pairs)):
            documents.append(
                {
                    "text": f"{', '.join(pairs)}.\n",
                    "prefix": f"{answered}{keys[asked]}",
                    "target": f" {values[asked]}",
                }
            )
            answered += f"{pairs[asked]}, "
    return documents


def load(sweep: Mapping[str, Any] | None = None, **metadata: Any) -> dict[str, Any]:
    """The data of the task (lm-eval's `custom_dataset`)."""
    return as_test_split(make_documents(read_settings(MQARSettings, metadata, sweep)))
