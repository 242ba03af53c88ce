"""Multi-needle key retrieval (arXiv 2410.05258, "Key Information Retrieval").

Sentences "The magic number of CITY is NUMBER.", the needles, are hidden in other prose, and the model is asked for the
numbers of some cities. The needles asked for stand side by side at a given depth of the context, the others anywhere.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

from gda.eval.tasks.settings import CountTokens, as_test_split, read_settings, require_integer, token_counter
from gda.eval.tasks.vocabulary import CITIES, sentence

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
GENERATED_TOKENS = 64  # max_gen_toks in needles.yaml; a digit can take a whole token


@dataclass(frozen=True)
class NeedleSettings:
    """Settings of the prompts."""

    length: int  # of a prompt at most, in tokens (or words)
    depth: float | str  # position of the answer, from 0 (first sentence) to 1 (last), or "all": `DEPTHS` in turn
    needles: int  # N in the paper
    queries: int  # needles asked for, R in the paper
    digits: int  # of a magic number
    samples: int  # number of prompts
    data_seed: int

    def __post_init__(self) -> None:
        require_integer("length", self.length, 1)
        require_integer("needles", self.needles, 1, len(CITIES))
        require_integer("queries", self.queries, 1, self.needles)
        require_integer("digits", self.digits, 3, 15)
        if self.queries * (self.digits + len(", ")) > GENERATED_TOKENS:
            raise ValueError(
                f"`queries` {self.queries} numbers of {self.digits} `digits` can take more than the "
                f"{GENERATED_TOKENS} tokens that are generated"
            )
        require_integer("samples", self.samples, 1)
        require_integer("data_seed", self.data_seed, 0)
        is_share = isinstance(self.depth, int | float) and not isinstance(self.depth, bool) and 0 <= self.depth <= 1
        if not is_share and self.depth != "all":
            raise ValueError(f"`depth` must be a number from 0 to 1; got {self.depth!r}")

    @property
    def depths(self) -> tuple[float, ...]:
        """The depths that the prompts have in turn."""
        return DEPTHS if self.depth == "all" else (float(self.depth),)


@dataclass(frozen=True)
class NeedlePrompt:
    """A prompt: `context`, blank line, `question`, space, `prefix`. The model continues from there."""

    context: str
    question: str
    prefix: str
    target: str  # the right continuation
    answers: list[str]  # the numbers asked for, in the order of the question
    depth: float  # position of the needles asked for, from 0 to 1
    answer_start: int  # position of their sentences in `context`, in characters
    answer_end: int

    @property
    def text(self) -> str:
        """The whole prompt."""
        return f"{self.context}\n\n{self.question} {self.prefix}"


def make_prompts(settings: NeedleSettings, count: CountTokens) -> list[NeedlePrompt]:
    """Make the prompts, each as long as `settings.length` allows in whole sentences.

    Prompts of two depths, with all other settings equal, differ in the order of their sentences only.

    Raises:
        ValueError: if the length is too short for the needles and the question.
    """
    depths = settings.depths
    return [
        _make_prompt(settings, count, Random(f"needles {settings.data_seed} {index}"), depths[index % len(depths)])
        for index in range(settings.samples)
    ]


def _make_prompt(settings: NeedleSettings, count: CountTokens, random: Random, depth: float) -> NeedlePrompt:
    cities = random.sample(CITIES, settings.needles)
    lowest = 10 ** (settings.digits - 1)
    numbers = [str(number) for number in random.sample(range(lowest, 10 * lowest), settings.needles)]
    needles = [f"The magic number of {city} is {number}." for city, number in zip(cities, numbers, strict=True)]
    asked, others = needles[: settings.queries], needles[settings.queries :]
    places = [random.random() for _ in others]
    question, prefix, target = _ask(cities[: settings.queries], numbers[: settings.queries])

    def prompt(prose: list[str]) -> NeedlePrompt:
        sentences = list(prose)
        # From the end, so that the earlier places stay valid.
        for place, needle in sorted(zip(places, others, strict=True), reverse=True):
            sentences.insert(round(place * len(prose)), needle)
        at = round(depth * len(sentences))
        before, answer, after = " ".join(sentences[:at]), " ".join(asked), " ".join(sentences[at:])
        start = len(before) + bool(before)
        return NeedlePrompt(
            context=" ".join(part for part in (before, answer, after) if part),
            question=question,
            prefix=prefix,
            target=target,
            answers=numbers[: settings.queries],
            depth=depth,
            answer_start=start,
            answer_end=start + len(answer),
        )

    prose: list[str] = []
    left = settings.length - count(prompt([]).text)
    if left < 0:
        raise ValueError(
            f"`length` {settings.length} is too short for {settings.needles} needles and the question, "
            f"which take {settings.length - left}"
        )
    while left > 0:
        prose.append(sentence(random))
        left -= count(f" {prose[-1]}")
    made = prompt(prose)
    while count(made.text) > settings.length:
        prose.pop()
        made = prompt(prose)
    return made


def _ask(cities: list[str], numbers: list[str]) -> tuple[str, str, str]:
    if len(cities) == 1:
        of = cities[0]
        return f"Question: What is the magic number of {of}?\nAnswer:", f"The magic number of {of} is", f" {numbers[0]}"
    of = _enumerate(cities)
    question = f"Question: What are the magic numbers of {of}?\nAnswer:"
    return question, f"The magic numbers of {of} are", f" {_enumerate(numbers)}"


def _enumerate(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def load(sweep: Mapping[str, Any] | None = None, **metadata: Any) -> dict[str, Any]:
    """The data of the task (lm-eval's `custom_dataset`)."""
    prompts = make_prompts(read_settings(NeedleSettings, metadata, sweep), token_counter(metadata))
    return as_test_split([asdict(prompt) for prompt in prompts])


def score(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """`acc`: share of the numbers asked for that were given in the right order; `exact_match`: whether all were."""
    given = re.findall(r"\d+", results[0])[: len(document["answers"])]
    right = [number == answer for number, answer in zip(given, document["answers"], strict=False)]
    return {"acc": sum(right) / len(document["answers"]), "exact_match": float(sum(right) == len(document["answers"]))}
