"""Few-shot classification with the same examples in many orders (arXiv 2410.05258, "In-Context Learning").

The model classifies a sentence about a thing by the kind of thing. Each question is asked after the same examples in
several orders. A robust model gives the same answer in every order; the task measures how much its accuracy varies.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from random import Random
from typing import Any, NamedTuple

import numpy as np

from gda.eval.tasks.settings import as_test_split, read_settings, require_integer
from gda.eval.tasks.vocabulary import words_of

ARRANGEMENTS = ("random", "alternate")
THINGS = {
    "animal": words_of(
        "bear camel cow crab deer donkey eagle fox frog goat hen horse lion monkey mouse owl pig rabbit sheep "
        "snake spider swan tiger whale wolf"
    ),
    "food": words_of(
        "apple banana biscuit burger cake carrot cheese cookie grape lemon mango melon muffin noodle onion "
        "pancake peach pear pie pizza potato pudding sandwich sausage tomato"
    ),
    "tool": words_of(
        "axe chisel crowbar drill hacksaw hammer hoe lathe mallet pickaxe pincer pitchfork plough pump rake "
        "sander scraper screwdriver shovel sickle spade spanner trowel vice wrench"
    ),
    "clothing": words_of(
        "apron belt blouse boot bonnet cap cape cardigan cloak coat dress glove gown hat hoodie jacket mitten "
        "robe sandal scarf shirt skirt sock sweater vest"
    ),
    "vehicle": words_of(
        "ambulance bicycle boat bus canoe car carriage cart ferry glider helicopter jeep kayak limousine "
        "lorry motorcycle raft ship submarine taxi tractor train tram truck van"
    ),
    "instrument": words_of(
        "accordion banjo bassoon bugle cello clarinet cornet cymbal drum fiddle flute guitar harp harpsichord "
        "lute mandolin oboe organ piano saxophone tambourine trombone trumpet ukulele violin"
    ),
}
LABELS = tuple(THINGS)
_FRAMES = (
    "My sister told me about the {}.",
    "There was a picture of the {} on the wall.",
    "The {} was there again yesterday.",
    "Nobody had noticed the {} before.",
    "He wrote a short story about the {}.",
    "She could not forget the {}.",
    "They talked about the {} all evening.",
    "Everybody liked the {}.",
)


@dataclass(frozen=True)
class FewShotSettings:
    """Settings of the documents."""

    shots: int  # number of examples of each of the six kinds
    orders: int  # number of different orders of the same examples
    samples: int  # number of questions, each asked after every order
    arrangement: str  # "random" (any order) or "alternate" (the kinds in turn)
    data_seed: int

    def __post_init__(self) -> None:
        things = len(THINGS[LABELS[0]])
        require_integer("shots", self.shots, 1, things - 1)
        most = math.factorial(len(LABELS))  # orders of one example per kind
        require_integer("orders", self.orders, 2, most)
        require_integer("samples", self.samples, 1)
        require_integer("data_seed", self.data_seed, 0)
        if self.arrangement not in ARRANGEMENTS:
            raise ValueError(f"`arrangement` must be one of {ARRANGEMENTS}; got {self.arrangement!r}")


def make_documents(settings: FewShotSettings) -> list[dict[str, Any]]:
    """One document for each question and order.

    It holds `text`; `choices`; `label`, the index of the right choice; `question` and `order`, counted from 0; and
    `orders`, their number. The documents of a question are consecutive, so that a limited run asks few questions in
    every order rather than many in some. No example is about a thing that is asked about, and no question repeats
    before all have been asked.
    """
    random = Random(f"fewshot {settings.data_seed}")
    shown: dict[str, list[str]] = {}
    asked: dict[str, Iterator[str]] = {}
    for label, things in THINGS.items():
        shuffled = random.sample(things, len(things))
        shown[label] = [_example(random, thing, label) for thing in shuffled[: settings.shots]]
        asked[label] = _questions(random, shuffled[settings.shots :])
    orders: dict[tuple[str, ...], None] = {}
    while len(orders) < settings.orders:
        orders[_arrange(random, shown, settings.arrangement)] = None
    documents = []
    for question in range(settings.samples):
        label = LABELS[question % len(LABELS)]
        text = next(asked[label])
        for order, examples in enumerate(orders):
            documents.append(
                {
                    "text": "\n\n".join([*examples, text]),
                    "choices": list(LABELS),
                    "label": LABELS.index(label),
                    "question": question,
                    "order": order,
                    "orders": len(orders),
                }
            )
    return documents


def _questions(random: Random, things: Sequence[str]) -> Iterator[str]:
    """An endless sequence: every thing once, then every thing in another sentence, and so on."""
    frames = [random.sample(_FRAMES, len(_FRAMES)) for _ in things]
    return cycle(
        [
            _question(frame, thing)
            for of_round in zip(*frames, strict=True)
            for frame, thing in zip(of_round, things, strict=True)
        ]
    )


def _question(frame: str, thing: str) -> str:
    return f"Text: {frame.format(thing)}\n"


def _example(random: Random, thing: str, label: str) -> str:
    return f"{_question(random.choice(_FRAMES), thing)}Kind: {label}"


def _arrange(random: Random, shown: Mapping[str, Sequence[str]], arrangement: str) -> tuple[str, ...]:
    if arrangement == "random":
        examples = [example for of_label in shown.values() for example in of_label]
        return tuple(random.sample(examples, len(examples)))
    columns = [random.sample(of_label, len(of_label)) for of_label in random.sample(list(shown.values()), len(shown))]
    return tuple(example for round_ in zip(*columns, strict=True) for example in round_)


def load(sweep: Mapping[str, Any] | None = None, **metadata: Any) -> dict[str, Any]:
    """The data of the task (lm-eval's `custom_dataset`)."""
    return as_test_split(make_documents(read_settings(FewShotSettings, metadata, sweep)))


class Answer(NamedTuple):
    """Whether the answer to a question is right (1.0 or 0.0) after one of the `orders` orders of the examples."""

    question: int
    order: int
    orders: int
    right: float


def score(document: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float | Answer]:
    """Whether the likeliest label is right; NaN if a log-likelihood is NaN, since then no label is the likeliest."""
    loglikelihoods = [loglikelihood for loglikelihood, _ in results]
    right = float(loglikelihoods.index(max(loglikelihoods)) == document["label"])
    if any(map(math.isnan, loglikelihoods)):
        right = math.nan
    answer = Answer(document["question"], document["order"], document["orders"], right)
    return {"acc": right, "acc_worst": answer, "acc_best": answer, "acc_margin": answer, "acc_std": answer}


def worst(answers: Iterable[Answer]) -> float:
    """Accuracy of the worst order."""
    return float(np.min(by_order(answers)))


def best(answers: Iterable[Answer]) -> float:
    """Accuracy of the best order."""
    return float(np.max(by_order(answers)))


def margin(answers: Iterable[Answer]) -> float:
    """Accuracy of the best order minus that of the worst."""
    return float(np.ptp(by_order(answers)))


def deviation(answers: Iterable[Answer]) -> float:
    """Standard deviation of the accuracy over orders."""
    return float(np.std(by_order(answers)))


def by_order(answers: Iterable[Answer]) -> list[float]:
    """The accuracy of each order over the questions that were asked in every order; NaN if there are none.

    (A limited run may ask the last question in some orders only.)
    """
    questions: dict[int, dict[int, float]] = defaultdict(dict)
    orders = 0
    for answer in answers:
        questions[answer.question][answer.order] = answer.right
        orders = answer.orders
    complete = [each for each in questions.values() if len(each) == orders]
    return [float(np.mean([each[order] for each in complete])) if complete else math.nan for order in range(orders)]
