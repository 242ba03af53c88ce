"""Rows of the ratio experiment: three tasks of `gda eval` in a small vocabulary, and text.

The generators of `gda.eval.tasks` write English, made-up words and numbers. Those words and numbers, and the cities,
have no meaning here, so each example spells them with tokens that are drawn anew: one token per word or number,
different ones for different words. Any other word or sign is one token as well; "The magic number of" is one in all,
and "is" none, so that a number follows its city as a value follows its key. So a small model learns the tasks in a
minute (key retrieval stayed at chance while cities always had the same tokens). Text has the ids above, from a
byte-pair encoding of its own.

The noise is, in recall, half of the pairs of a list and the other lists of the row; in retrieval, prose and a
third of the sentences with numbers; in copying, the words that have been copied or are still to come.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from measuring import trained_tokenizer
from safetensors.torch import load_file, save
from torch import Tensor

from gda.common.files import written_beside
from gda.common.text import python_documentation, read_text
from gda.eval.tasks import copying, mqar, needles
from gda.eval.tasks.vocabulary import CITIES

IGNORED = -100
TEXT_VOCABULARY = 1024
DRAWN = 80  # tokens for made-up words, cities and numbers, the first ids
TOKEN = re.compile(r"The magic number of|\b(?!is\b)\w+|[^\w ]")
NEEDLE = re.compile(r"The magic number of (.+?) is (\d+)\.")
QUERY = "\nThe magic number of %s"
QUESTION = "\n\nQuestion: What is the magic number of Quito?\nAnswer: The magic number of Quito is"

Example = tuple[list[int], list[int]]  # ids, and labels: IGNORED except for answers


@dataclass(frozen=True)
class Recall:
    """Associative recall: the values of some of the keys of a list of pairs."""

    pairs: int
    queries: int
    per_row: int  # examples

    def examples(self, samples: int, seed: int) -> Iterator[Example]:
        """One example per list, with all of its queries."""
        settings = mqar.MQARSettings(pairs=self.pairs, queries=self.queries, samples=samples, data_seed=seed)
        documents = mqar.make_documents(settings)
        for first in range(0, len(documents), self.queries):
            asked = documents[first : first + self.queries]
            parts = [(asked[0]["text"], False)]
            for document in asked:
                parts += [(document["prefix"].rsplit(", ", 1)[-1], False), (document["target"], True), (",", False)]
            yield encode(parts, Random(f"{seed} {first}"))


@dataclass(frozen=True)
class Copying:
    """Copying: the words that follow a cue in a list of words."""

    words: int
    copied: int
    per_row: int

    def examples(self, samples: int, seed: int) -> Iterator[Example]:
        """One example per list."""
        settings = copying.CopySettings(length=self.words, copied=self.copied, samples=samples, data_seed=seed)
        for index, document in enumerate(copying.make_documents(settings, count=lambda _: 1)):
            parts = [(document["text"] + document["prefix"], False), (document["target"], True)]
            yield encode(parts, Random(f"{seed} {index}"))


@dataclass(frozen=True)
class Needles:
    """Key retrieval: the numbers of some of the cities that sentences in prose name, asked for in any order."""

    length: int  # tokens
    needles: int
    queries: int
    per_row: int

    def examples(self, samples: int, seed: int) -> Iterator[Example]:
        """One example per prompt. The prompt's own question gives way to the queries."""
        length = self.length - self.queries * tokens_in(QUERY % "Quito" + " 5") + tokens_in(QUESTION)
        settings = needles.NeedleSettings(
            length=length, depth="all", needles=self.needles, queries=1, digits=3, samples=samples, data_seed=seed
        )
        for index, prompt in enumerate(needles.make_prompts(settings, count=tokens_in)):
            random = Random(f"{seed} {index}")
            parts = [(prompt.context, False)]
            for city, number in random.sample(NEEDLE.findall(prompt.context), self.queries):
                parts += [(QUERY % city, False), (number, True)]
            yield encode(parts, random)


Task = Recall | Copying | Needles


def tokens_in(text: str) -> int:
    """The number of tokens of a text."""
    return len(TOKEN.findall(text))


@cache
def english() -> dict[str, int]:
    """Ids of the words and signs that the generators write, made-up words, cities and numbers aside."""
    settings = needles.NeedleSettings(
        length=100, depth="all", needles=4, queries=2, digits=3, samples=4000, data_seed=0
    )
    prompts = needles.make_prompts(settings, count=tokens_in)
    found = {token for prompt in prompts for token in TOKEN.findall(prompt.text) if not token.isdigit()} - {*CITIES}
    return {token: DRAWN + index for index, token in enumerate(sorted(found))}


def encode(parts: list[tuple[str, bool]], random: Random) -> Example:
    """Ids and labels of texts, each with whether it is an answer."""
    known, drawn = english(), random.sample(range(DRAWN), DRAWN)
    new: dict[str, int] = {}
    ids: list[int] = []
    labels: list[int] = []
    for text, is_answer in parts:
        for token in TOKEN.findall(text):
            if token not in known and token not in new:
                new[token] = drawn[len(new)]
            ids.append(known[token] if token in known else new[token])
            labels.append(ids[-1] if is_answer else IGNORED)
    return ids, labels


class Rows(NamedTuple):
    """Ids (N, T) and labels (N, T); filled up at the end, where labels are IGNORED."""

    ids: Tensor
    labels: Tensor


def task_rows(task: Task, length: int, count: int, seed: int) -> Rows:
    """Rows of `per_row` examples each.

    Raises:
        ValueError: if they are longer than `length`.
    """
    ids, labels = torch.zeros(count, length, dtype=torch.int16), torch.full((count, length), IGNORED, dtype=torch.int16)
    examples = task.examples(count * task.per_row, seed)
    for row, parts in enumerate(zip(*[examples] * task.per_row, strict=True)):
        tokens, answers = ([*chain(*each)] for each in zip(*parts, strict=True))
        if len(tokens) > length:
            raise ValueError(f"a row of {task} has {len(tokens)} tokens, more than {length}")
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, : len(tokens)] = torch.tensor(answers)
    return Rows(ids, labels)


def both_texts(text: Path | None, held_out: Path | None) -> tuple[str, str]:
    """The text to train on, and the one to measure on: by default, Python's documentation, and the last tenth of it."""
    read = read_text(text)[1] if text else python_documentation()
    if held_out:
        return read, read_text(held_out)[1]
    return read[: len(read) * 9 // 10], read[len(read) * 9 // 10 :]


def prepare_text(text: str, held_out: str, file: Path) -> None:
    """Write the ids of both texts to a safetensors file, from a byte-level tokenizer of the first one."""
    tokenizer = trained_tokenizer([text], TEXT_VOCABULARY, [])
    first = DRAWN + len(english())
    ids = {
        name: torch.tensor(tokenizer(each, verbose=False).input_ids, dtype=torch.int16) + first
        for name, each in (("text", text), ("held_out", held_out))
    }
    with written_beside(file) as opened:
        opened.write(save(ids))


def text_rows(file: Path, name: str, length: int, count: int, seed: int) -> Rows:
    """Sequences of the text `name`, in random order, repeated as often as needed."""
    ids = load_file(file)[name]
    sequences = ids[: len(ids) // length * length].view(-1, length)
    generator = torch.Generator().manual_seed(seed)
    passes = -(-count // len(sequences))
    order = torch.cat([torch.randperm(len(sequences), generator=generator) for _ in range(passes)])[:count]
    return Rows(sequences[order], sequences[order])
