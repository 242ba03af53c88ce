"""Key retrieval among distractors: the synthetic task of the sweep, generated on the device in plain torch.

A row is a context of two-token cells, followed by questions. Some cells, at random positions, hold a pair (key, value),
and no key occurs twice. All other cells are noise: a filler, then another filler or, as a distractor, a value that
belongs to no key. The questions are keys, each followed by its value. The loss is computed on these values only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

KEYS, VALUES, FILLERS = 64, 64, 64
VOCABULARY = KEYS + VALUES + FILLERS


@dataclass(frozen=True)
class Difficulty:
    """Number of pairs among `cells` cells, and of questions."""

    pairs: int
    cells: int
    questions: int

    @property
    def length(self) -> int:
        return 2 * (self.cells + self.questions)

    def __str__(self) -> str:
        return f"{self.pairs} pairs in {self.cells} cells"


def rows(difficulty: Difficulty, count: int, generator: torch.Generator) -> Tensor:
    """(count, length) token ids; the last 2 · questions of each row are key, value, key, value, …"""
    device, cells = generator.device, difficulty.cells

    def random(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device)

    def distinct(among: int, chosen: int) -> Tensor:
        """(count, chosen) different numbers below `among`, in random order."""
        return torch.rand(count, among, generator=generator, device=device).argsort(dim=1)[:, :chosen]

    first = random(KEYS + VALUES, VOCABULARY, count, cells)
    is_lure = random(0, 2, count, cells).bool()
    filler = random(KEYS + VALUES, VOCABULARY, count, cells)
    second = torch.where(is_lure, random(KEYS, KEYS + VALUES, count, cells), filler)
    keys = distinct(KEYS, difficulty.pairs)
    values = random(KEYS, KEYS + VALUES, count, difficulty.pairs)
    places = distinct(cells, difficulty.pairs)
    context = torch.stack((first.scatter(1, places, keys), second.scatter(1, places, values)), dim=2)
    asked = distinct(difficulty.pairs, difficulty.questions)
    questions = torch.stack((keys.gather(1, asked), values.gather(1, asked)), dim=2)
    return torch.cat((context, questions), dim=1).flatten(1)


def question_places(difficulty: Difficulty, device: torch.device) -> Tensor:
    """Positions of the keys asked for. The next position of each is the answer."""
    return torch.arange(2 * difficulty.cells, difficulty.length, 2, device=device)
