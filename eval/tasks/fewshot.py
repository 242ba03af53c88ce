"""Few-shot classification with the same examples in many orders (arXiv 2410.05258, "In-Context Learning").

Sentences about a thing are to be given the thing's kind. Every question is asked after the same examples in each of
several orders. A model that is robust to order answers alike: what is measured is how far its accuracy spreads.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from statistics import mean, pstdev
from typing import TYPE_CHECKING, Any

from gda.eval.tasks.settings import as_test_split, read_settings, require_integer
from gda.eval.tasks.vocabulary import words_of

if TYPE_CHECKING:
    from datasets import Dataset

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
    """What decides the documents.

    Attributes:
        shots: Examples of each of the six kinds.
        orders: Orders that the same examples are shown in.
        samples: Questions, each asked after every order.
        arrangement: "random", any order; or "alternate", the kinds in turn.
        data_seed: Decides everything random.
    """

    shots: int
    orders: int
    samples: int
    arrangement: str
    data_seed: int

    def __post_init__(self) -> None:
        things = len(THINGS[LABELS[0]])
        require_integer("shots", self.shots, 1, things - 1)
        require_integer("orders", self.orders, 2)
        require_integer("samples", self.samples, 1)
        require_integer("data_seed", self.data_seed, 0)
        if self.arrangement not in ARRANGEMENTS:
            raise ValueError(f"`arrangement` must be one of {ARRANGEMENTS}, and is {self.arrangement!r}")


def make_documents(settings: FewShotSettings) -> list[dict[str, Any]]:
    """One document for each question and order: `text`, `choices`, `label` (index of the right one), `order`.

    A question's documents stand together, so that the first few of a limited run hold every order. Things that are
    asked about are in no example.
    """
    random = Random(f"fewshot {settings.data_seed}")
    shown: dict[str, list[str]] = {}
    asked: dict[str, list[str]] = {}
    for label, things in THINGS.items():
        shuffled = random.sample(things, len(things))
        shown[label] = [_example(random, thing, label) for thing in shuffled[: settings.shots]]
        asked[label] = shuffled[settings.shots :]
    orders = [_arrange(random, shown, settings.arrangement) for _ in range(settings.orders)]
    documents = []
    for question in range(settings.samples):
        label = LABELS[question % len(LABELS)]
        text = _question(random, random.choice(asked[label]))
        for order, examples in enumerate(orders):
            documents.append(
                {
                    "text": "\n\n".join([*examples, text]),
                    "choices": list(LABELS),
                    "label": LABELS.index(label),
                    "order": order,
                }
            )
    return documents


def _question(random: Random, thing: str) -> str:
    return f"Text: {random.choice(_FRAMES).format(thing)}\n"


def _example(random: Random, thing: str, label: str) -> str:
    return f"{_question(random, thing)}Kind: {label}"


def _arrange(random: Random, shown: Mapping[str, Sequence[str]], arrangement: str) -> list[str]:
    if arrangement == "random":
        examples = [example for of_label in shown.values() for example in of_label]
        return random.sample(examples, len(examples))
    columns = [random.sample(of_label, len(of_label)) for of_label in random.sample(list(shown.values()), len(shown))]
    return [example for round_ in zip(*columns, strict=True) for example in round_]


def load(sweep: Mapping[str, Any] | None = None, **metadata: Any) -> "dict[str, Dataset]":
    """The task's data, for lm-eval's `custom_dataset`."""
    return as_test_split(make_documents(read_settings(FewShotSettings, metadata, sweep)))


Scored = tuple[int, float]  # an order, and whether the answer after it is right


def score(document: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float | Scored]:
    """Whether the likeliest label is the right one; for the spread over orders, together with the order."""
    loglikelihoods = [loglikelihood for loglikelihood, _ in results]
    right = float(loglikelihoods.index(max(loglikelihoods)) == document["label"])
    scored = document["order"], right
    return {"acc": right, "acc_worst": scored, "acc_best": scored, "acc_margin": scored, "acc_std": scored}


def worst(scored: Iterable[Scored]) -> float:
    """Accuracy of the worst order."""
    return min(by_order(scored))


def best(scored: Iterable[Scored]) -> float:
    """Accuracy of the best order."""
    return max(by_order(scored))


def margin(scored: Iterable[Scored]) -> float:
    """Accuracy of the best order less that of the worst."""
    accuracies = by_order(scored)
    return max(accuracies) - min(accuracies)


def deviation(scored: Iterable[Scored]) -> float:
    """Standard deviation of the accuracy over orders."""
    return pstdev(by_order(scored))


def by_order(scored: Iterable[Scored]) -> list[float]:
    """The accuracy of each order."""
    answers: dict[int, list[float]] = defaultdict(list)
    for order, right in scored:
        answers[order].append(right)
    return [mean(of_order) for _, of_order in sorted(answers.items())]
