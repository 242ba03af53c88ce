"""The generated tasks: their documents, and runs with lm-eval."""

import math
import random
import re
from itertools import pairwise
from statistics import mean
from typing import Any

import pytest

from gda.eval.tasks import TASKS_FOLDER, copying, fewshot, mqar, needles, settings
from gda.eval.tasks.scoring import continuation
from gda.eval.tasks.settings import count_words, token_counter, tokens_of
from gda.eval.tasks.vocabulary import made_up_words, sentence

from ..support.llamas import byte_tokenizer, llama_model, save_llama

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

pytestmark = pytest.mark.sampled

TASKS = (
    "gda_needles",
    *(f"gda_needles_depth_{depth}" for depth in (0, 25, 50, 75, 100)),
    *(f"gda_needles_length_{length}" for length in (256, 512, 1024)),
    "gda_mqar",
    *(f"gda_mqar_pairs_{pairs}" for pairs in (4, 8, 16, 32, 64)),
    "gda_copy",
    *(f"gda_copy_length_{length}" for length in (64, 256, 512)),
    "gda_fewshot",
    *(f"gda_fewshot_{arrangement}" for arrangement in ("random", "alternate")),
)
GROUPS = {
    "gda_needles_by_depth": 5,
    "gda_needles_by_length": 3,
    "gda_retrieval": 8,
    "gda_mqar_by_pairs": 5,
    "gda_copy_by_length": 3,
    "gda_fewshot_by_arrangement": 2,
    "gda_tasks": 18,
}


def task_manager(**metadata: Any) -> TaskManager:
    return TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False, metadata=metadata)


def needle_settings(**changes: Any) -> needles.NeedleSettings:
    fields = {"length": 120, "depth": 0.5, "needles": 4, "queries": 1, "digits": 7, "samples": 3, "data_seed": 0}
    return needles.NeedleSettings(**(fields | changes))


def sentences_of(text: str) -> list[str]:
    return re.findall(r"[^.]+\.", text)


# -------------------------------------------------------------------------------------------------------------- needles


@pytest.mark.parametrize("depth", needles.DEPTHS)
@pytest.mark.parametrize(("num_needles", "queries"), [(1, 1), (4, 1), (6, 2), (5, 5)])
@pytest.mark.parametrize("length", [200, 700])
def test_the_answer_is_at_the_depth_and_answers_the_question(
    depth: float, num_needles: int, queries: int, length: int
) -> None:
    settings = needle_settings(depth=depth, needles=num_needles, queries=queries, length=length)
    for prompt in needles.make_prompts(settings, count_words):
        facts = dict(re.findall(r"The magic number of (\w+) is (\d{7})\.", prompt.context))
        assert len(facts) == num_needles
        assert len(set(facts.values())) == num_needles
        asked = re.search(r"of ([\w, ]+)\?", prompt.question)
        assert asked is not None
        cities = re.split(r", | and ", asked[1])
        assert [facts[city] for city in cities] == prompt.answers
        assert re.findall(r"\d+", prompt.target) == prompt.answers
        assert prompt.prefix.endswith(" is" if queries == 1 else " are")

        answer = prompt.context[prompt.answer_start : prompt.answer_end]
        assert answer == " ".join(f"The magic number of {city} is {facts[city]}." for city in cities)
        before = len(sentences_of(prompt.context[: prompt.answer_start]))
        others = len(sentences_of(prompt.context)) - queries
        assert abs(before - depth * others) <= 0.5
        assert length - 20 < len(prompt.text.split()) <= length


def test_length_is_counted_in_tokens_of_the_tokenizer() -> None:
    tokenizer = byte_tokenizer()
    longest = 120  # most tokens of a sentence: this tokenizer has few words
    for length in (400, 1000, 3000):
        for prompt in needles.make_prompts(needle_settings(length=length, needles=2), tokens_of(tokenizer)):
            assert length - longest < len(tokenizer(prompt.text)["input_ids"]) <= length


def test_depths_differ_in_the_order_of_sentences_only() -> None:
    shallow, deep = (needles.make_prompts(needle_settings(depth=depth), count_words) for depth in (0.0, 0.75))
    for one, other in zip(shallow, deep, strict=True):
        assert one.context != other.context
        assert sorted(map(str.strip, sentences_of(one.context))) == sorted(map(str.strip, sentences_of(other.context)))
        assert (one.question, one.answers) == (other.question, other.answers)


def test_all_depths_are_taken_in_turn() -> None:
    prompts = needles.make_prompts(needle_settings(depth="all", samples=7), count_words)
    assert [prompt.depth for prompt in prompts] == [0.0, 0.25, 0.5, 0.75, 1.0, 0.0, 0.25]


@pytest.mark.parametrize(
    ("answers", "message", "acc", "exact_match"),
    [
        (["1234567"], " 1234567.", 1, 1),
        (["1234567"], " 1,234,567", 0, 0),
        (["1234567"], " 12345678", 0, 0),
        (["1234567"], " 7654321, no, 1234567", 0, 0),
        (["1234567"], "", 0, 0),
        (["11", "22"], " 11 and 22", 1, 1),
        (["11", "22"], " 11 and 23", 0.5, 0),
        (["11", "22"], " 22 and 11", 0, 0),
        (["11", "22"], " 11", 0.5, 0),
    ],
)
def test_numbers_count_in_their_order(answers: list[str], message: str, acc: float, exact_match: float) -> None:
    assert needles.score({"answers": answers}, [message]) == {"acc": acc, "exact_match": exact_match}


# ----------------------------------------------------------------------------------------------------- MQAR and copying


@pytest.mark.parametrize(("pairs", "queries"), [(1, 1), (4, 9), (40, 3), (2000, 2)])
def test_mqar_asks_for_pairs_of_the_list(pairs: int, queries: int) -> None:
    documents = mqar.make_documents(mqar.MQARSettings(pairs, queries, samples=2, data_seed=3))
    assert len(documents) == 2 * min(pairs, queries)
    for document in documents:
        values = dict(pair.split(" ") for pair in document["text"].removesuffix(".\n").split(", "))
        assert len(values) == pairs
        *answered, key = document["prefix"].split(", ")
        assert document["target"] == f" {values[key]}"
        assert [values[earlier] for earlier in (pair.split(" ")[0] for pair in answered)] == [
            pair.split(" ")[1] for pair in answered
        ]


@pytest.mark.parametrize(("length", "copied"), [(60, 1), (200, 8), (1500, 3)])
def test_copying_continues_the_sequence(length: int, copied: int) -> None:
    count = tokens_of(byte_tokenizer())
    documents = copying.make_documents(copying.CopySettings(length, copied, samples=20, data_seed=1), count)
    for document in documents:
        words, given, target = (document[name].split() for name in ("text", "prefix", "target"))
        assert (len(given), len(target)) == (copying.CUE, copied)
        at = words.index(given[0])
        assert words[at : at + copying.CUE + copied] == given + target
        assert len(set(words)) == len(words)
        assert length - 12 < count(f" {document['text'].strip()}") <= length
    assert len({document["text"] for document in documents}) == 20


def test_made_up_words_never_run_out() -> None:
    for number in (1, 100, 20_000):
        assert len(set(made_up_words(random.Random(0), number))) == number


def test_prose_holds_no_numbers_and_no_cities() -> None:
    source = random.Random(0)
    prose = [sentence(source) for _ in range(500)]
    assert len(set(prose)) > 490
    assert all(re.fullmatch(r"[A-Z][a-z, ]+\.", line) for line in prose)
    assert not [line for line in prose if re.search(r"\ba [aeiou]", line)]


# ------------------------------------------------------------------------------------------------------------- few-shot


THINGS = {thing: kind for kind, things in fewshot.THINGS.items() for thing in things}


def examples_of(document: dict[str, Any]) -> tuple[list[str], str]:
    *examples, question = document["text"].split("\n\n")
    return examples, question


@pytest.mark.parametrize("arrangement", fewshot.ARRANGEMENTS)
def test_orders_hold_the_same_examples(arrangement: str) -> None:
    settings = fewshot.FewShotSettings(3, orders=5, samples=12, arrangement=arrangement, data_seed=0)
    documents = fewshot.make_documents(settings)
    assert [document["order"] for document in documents] == [*range(5)] * 12
    by_order = [examples_of(document)[0] for document in documents[:5]]
    assert len({tuple(examples) for examples in by_order}) == 5
    assert len({tuple(sorted(examples)) for examples in by_order}) == 1
    kinds_of = [[example.rsplit(" ", 1)[1] for example in examples] for examples in by_order]
    if arrangement == "alternate":
        for kinds in kinds_of:
            assert len(set(kinds[:6])) == 6
            assert kinds == kinds[:6] * 3
    else:
        assert any(first == second for kinds in kinds_of for first, second in pairwise(kinds))


def test_questions_are_about_things_of_no_example() -> None:
    kind_of = THINGS
    assert len(kind_of) == 6 * 25
    documents = fewshot.make_documents(fewshot.FewShotSettings(20, 2, 60, "random", 5))
    for document in documents:
        examples, question = examples_of(document)
        shown = [next(word for word in re.findall(r"\w+", example) if word in kind_of) for example in examples]
        asked = next(word for word in re.findall(r"\w+", question) if word in kind_of)
        assert asked not in shown
        assert document["choices"][document["label"]] == kind_of[asked]
        assert [kind_of[thing] for thing in shown] == [example.rsplit(" ", 1)[1] for example in examples]


def test_questions_differ_as_long_as_they_can() -> None:
    things, frames = 25 - 20, 8
    documents = fewshot.make_documents(fewshot.FewShotSettings(20, 2, 6 * things * frames + 1, "random", 0))
    questions = [examples_of(document)[1] for document in documents if document["order"] == 0]
    asked = [next(word for word in re.findall(r"\w+", question)[::-1] if word in THINGS) for question in questions]
    assert len(set(asked[: 6 * things])) == 6 * things
    assert len(set(questions[:-1])) == 6 * things * frames
    assert questions[-1] == questions[0]


@pytest.mark.parametrize("arrangement", fewshot.ARRANGEMENTS)
def test_no_order_comes_twice(arrangement: str) -> None:
    documents = fewshot.make_documents(fewshot.FewShotSettings(1, 720, 1, arrangement, 0))
    assert len({document["text"] for document in documents}) == 720


def answers_of(rights: list[list[float]]) -> list[fewshot.Answer]:
    """Answers by question and order, in three orders each unless the run ended there."""
    return [fewshot.Answer(q, order, 3, right) for q, row in enumerate(rights) for order, right in enumerate(row)]


@pytest.mark.parametrize("cut_short", [[], [1.0], [0.0, 1.0]])
def test_spread_over_orders(cut_short: list[float]) -> None:
    """Over the questions asked in every order: a limited run may ask the last one in some orders only."""
    answers = answers_of([[1, 0, 1], [1, 0, 0], [0, 1, 0], cut_short])
    assert fewshot.by_order(answers) == pytest.approx([2 / 3, 1 / 3, 1 / 3])
    assert fewshot.best(answers) == pytest.approx(2 / 3)
    assert fewshot.worst(answers) == pytest.approx(1 / 3)
    assert fewshot.margin(answers) == pytest.approx(1 / 3)
    assert fewshot.deviation(answers) == pytest.approx(math.sqrt(2) / 9)


@pytest.mark.parametrize("rights", [[[1.0, 0.0]], [[1, 0, math.nan]], [[math.nan, 0, 1]]])
def test_an_unknown_spread_is_nan(rights: list[list[float]]) -> None:
    for metric in (fewshot.margin, fewshot.deviation):
        assert math.isnan(metric(answers_of(rights)))


def test_nan_is_not_a_right_answer() -> None:
    document = fewshot.make_documents(fewshot.FewShotSettings(1, 2, 1, "random", 0))[0]
    assert document["label"] == 0  # what max() and index() return with NaNs
    for place in (0, 5):
        loglikelihoods = [-1.0] * 6
        loglikelihoods[place] = math.nan
        scores = fewshot.score(document, [(loglikelihood, False) for loglikelihood in loglikelihoods])
        assert math.isnan(scores["acc"])  # type: ignore[arg-type]
        assert math.isnan(scores["acc_margin"].right)  # type: ignore[union-attr]
    assert math.isnan(continuation({}, [(math.nan, True)])["acc"])
    assert continuation({}, [(-1.0, True)]) == {"acc": 1.0, "loglikelihood": -1.0}


@pytest.mark.slow
def test_a_limited_run_compares_orders_over_the_same_questions() -> None:
    """15 documents: 8 orders of a question that this reader answers, and 7 of one that it cannot answer."""

    class Half(Reader):
        @staticmethod
        def answer(text: str) -> str:
            right = Reader.answer(text)
            return right if right == " animal" else "nothing"

    for limit, margin in ((15, 0.0), (7, math.nan)):
        results = simple_evaluate(Half(), tasks=["gda_fewshot"], task_manager=task_manager(), limit=limit)
        assert results["results"]["gda_fewshot"]["acc_margin,none"] == pytest.approx(margin, nan_ok=True)


# ------------------------------------------------------------------------------------------------------------- settings


def test_seed_determines_the_documents() -> None:
    def made(seed: int) -> list[Any]:
        return [
            needles.load(length=90, depth=0.5, needles=3, queries=2, digits=5, samples=2, data_seed=seed)["test"][:],
            mqar.load(pairs=5, queries=2, samples=2, data_seed=seed)["test"][:],
            copying.load(length=40, copied=2, samples=2, data_seed=seed)["test"][:],
            fewshot.load(shots=1, orders=2, samples=2, arrangement="random", data_seed=seed)["test"][:],
        ]

    assert made(4) == made(4)
    assert all(one != other for one, other in zip(made(4), made(5), strict=True))


def test_seed_in_the_metadata_warns(caplog: pytest.LogCaptureFixture) -> None:
    settings._warn_once.cache_clear()
    task_manager(seed=3).load(["gda_mqar"])
    assert "`data_seed` does" in caplog.text


def test_data_is_unchanged() -> None:
    """A change here changes scores and needs a new `version` in the task's YAML file."""
    [prompt] = needles.make_prompts(needle_settings(length=40, needles=2, samples=1), count_words)
    assert prompt.text == NEEDLES_OF_SEED_0
    assert mqar.make_documents(mqar.MQARSettings(3, 2, 1, 0))[1] == MQAR_OF_SEED_0
    assert copying.make_documents(copying.CopySettings(10, 2, 1, 0), count_words) == [COPY_OF_SEED_0]
    assert fewshot.make_documents(fewshot.FewShotSettings(1, 2, 1, "alternate", 0))[1]["text"] == FEWSHOT_OF_SEED_0


NEEDLES_OF_SEED_0 = (
    "The magic number of Chicago is 3214645. The magic number of Cork is 9634106. On a rainy day, the friendly "
    "neighbour hid a new coat.\n\nQuestion: What is the magic number of Cork?\nAnswer: The magic number of Cork is"
)
MQAR_OF_SEED_0 = {"text": "zine 55, nuli 81, migo 80.\n", "prefix": "migo 80, nuli", "target": " 81"}
COPY_OF_SEED_0 = {
    "text": "buve tife zapi sifa tafe zeba mofa dezu tuki foma\n",
    "prefix": "tafe zeba mofa dezu",
    "target": " tuki foma",
    "place": 0.4,
}
FEWSHOT_OF_SEED_0 = (
    "Text: There was a picture of the tiger on the wall.\nKind: animal\n\n"
    "Text: Everybody liked the burger.\nKind: food\n\n"
    "Text: They talked about the chisel all evening.\nKind: tool\n\n"
    "Text: There was a picture of the ferry on the wall.\nKind: vehicle\n\n"
    "Text: There was a picture of the organ on the wall.\nKind: instrument\n\n"
    "Text: My sister told me about the glove.\nKind: clothing\n\n"
    "Text: There was a picture of the fox on the wall.\n"
)


@pytest.mark.parametrize(
    ("task", "metadata", "message"),
    [
        ("gda_needles", {"needles": 0}, "`needles`"),
        ("gda_needles", {"needles": 1000}, "`needles`"),
        ("gda_needles", {"queries": 9, "needles": 8}, "`queries`"),
        ("gda_needles", {"queries": 8, "needles": 8}, "`queries` 8 numbers of 7 `digits`"),
        ("gda_needles", {"length": "long"}, "`length`"),
        ("gda_needles", {"length": 20}, "`length` 20 is too short for 6 needles"),
        ("gda_needles", {"depth": 50}, "`depth`"),
        ("gda_needles", {"samples": 2.5}, "`samples`"),
        ("gda_needles", {"lenght": 200}, "did you mean `length`"),
        ("gda_needles", {"tokenizer": "no/such/folder"}, "no/such/folder"),
        ("gda_mqar", {"pairs": True}, "`pairs`"),
        ("gda_mqar", {"data_seed": -1}, "`data_seed`"),
        ("gda_copy", {"length": 9, "copied": 6}, "`length` 9 holds 9 words, too few"),
        ("gda_fewshot", {"shots": 25}, "`shots`"),
        ("gda_fewshot", {"orders": 1}, "`orders`"),
        ("gda_fewshot", {"orders": 721}, "`orders`"),
        ("gda_fewshot", {"arrangement": "sorted"}, "`arrangement`"),
    ],
)
def test_invalid_settings_are_refused(task: str, metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        task_manager(**metadata).load([task])
    assert "\n" not in str(caught.value)


def test_tokenizer_of_the_tasks(tmp_path: Any) -> None:
    folder = save_llama(tmp_path / "llama")
    text, tokens = "The thing in the thin tin.", len(byte_tokenizer()("The thing in the thin tin.")["input_ids"])
    assert tokens > count_words(text)
    for metadata in (
        {"tokenizer": byte_tokenizer()},
        {"tokenizer": str(folder)},
        {"pretrained": str(folder)},
        {"pretrained": "no/such/model", "tokenizer": str(folder), "dtype": "float32", "revision": None},
    ):
        assert token_counter(metadata)(text) == tokens
    for metadata in ({}, {"pretrained": llama_model()}):
        assert token_counter(metadata)(text) == count_words(text)


# -------------------------------------------------------------------------------------------------------------- lm-eval


class Reader(LM):
    """Answers prompts by reading them, without access to documents and targets."""

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        answers = [(self.answer(request.args[0]), request.args[1]) for request in requests]
        return [(0.0, True) if continuation == answer else (-9.0, False) for answer, continuation in answers]

    @staticmethod
    def answer(text: str) -> str:
        if text.endswith("\nKind:"):
            asked = re.findall(r"\w+", text.split("\n\n")[-1])
            return next(f" {kind}" for kind, things in fewshot.THINGS.items() if set(things) & set(asked))
        first, second = text.split("\n")
        words, asked = first.split(), second.split()[-1]
        at = words.index(asked) + 1
        if "," in first:
            return f" {words[at].strip(',.')}"
        return " " + " ".join(words[at : at + 2])

    def generate_until(self, requests: list[Any]) -> list[str]:
        return [self.number_in(request.args[0]) for request in requests]

    @staticmethod
    def number_in(text: str) -> str:
        facts = dict(re.findall(r"The magic number of (\w+) is (\d+)", text))
        return f" {facts[re.findall(r'The magic number of (.+) is$', text)[-1]]}"

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise NotImplementedError


@pytest.mark.slow
def test_reader_of_the_prompts_scores_1() -> None:
    results = simple_evaluate(Reader(), tasks=list(TASKS), task_manager=task_manager(samples=3), bootstrap_iters=0)
    assert set(results["results"]) == set(TASKS)
    for task, scores in results["results"].items():
        assert scores["acc,none"] == 1, task
    assert results["results"]["gda_fewshot"]["acc_margin,none"] == 0
    assert results["results"]["gda_needles"]["exact_match,none"] == 1


def test_groups_hold_the_sweeps() -> None:
    for group, number in GROUPS.items():
        loaded = task_manager(samples=1).load([group])
        assert len(loaded["tasks"]) == number
        assert set(loaded["tasks"]) <= set(TASKS)
    assert set(task_manager().all_subtasks) == set(TASKS)
    assert set(task_manager().all_groups) == set(GROUPS)


def test_readme_names_existing_tasks() -> None:
    named = set(re.findall(r"`(gda_\w+)`", (TASKS_FOLDER.parent / "README.md").read_text()))
    assert named <= set(TASKS) | set(GROUPS)
    assert named >= set(GROUPS)


def test_metadata_reaches_the_data_and_a_sweep_keeps_its_setting() -> None:
    manager = task_manager(tokenizer=byte_tokenizer(), length=1500, samples=2, needles=3)
    count = tokens_of(byte_tokenizer())
    loaded = manager.load(["gda_needles", "gda_needles_length_1024", "gda_needles_depth_75"])["tasks"]
    for name, length, depths in (
        ("gda_needles", 1500, [0.0, 0.25]),
        ("gda_needles_length_1024", 1024, [0.0, 0.25]),
        ("gda_needles_depth_75", 1500, [0.75, 0.75]),
    ):
        documents = list(loaded[name].test_docs())
        assert [document["depth"] for document in documents] == depths
        for document in documents:
            assert length - 120 < count(needles.NeedlePrompt(**document).text) <= length
            assert document["context"].count("magic number") == 3


@pytest.mark.slow
def test_lm_eval_runs_every_task_on_a_model() -> None:
    model = llama_model(max_position_embeddings=2048)
    lm = HFLM(pretrained=model, tokenizer=byte_tokenizer(), backend="causal", batch_size=4, device="cpu")
    manager = task_manager(tokenizer=byte_tokenizer(), samples=2, queries=1, needles=2, shots=1, orders=2)
    results = simple_evaluate(
        lm, tasks=["gda_tasks"], task_manager=manager, gen_kwargs="max_gen_toks=4", bootstrap_iters=10
    )
    assert set(TASKS) - set(results["results"]) == {"gda_needles", "gda_mqar", "gda_copy", "gda_fewshot"}
    for group in set(GROUPS) - {"gda_tasks"}:
        members = [results["results"][name] for name in manager.load([group])["tasks"]]
        assert results["results"][group]["acc,none"] == pytest.approx(mean(scores["acc,none"] for scores in members))
    for name in ("gda_mqar_pairs_4", "gda_copy_length_64"):
        assert results["results"][name]["loglikelihood,none"] < 0


@pytest.mark.parametrize(
    ("task", "turn"),
    [
        ("gda_needles", r"Answer:<\|assistant\|>The magic number of \w+ is"),
        ("gda_mqar", r"\.\n?<\|assistant\|>\w+"),
        ("gda_copy", r"\w\n?<\|assistant\|>(\w+ ){3}\w+"),
        ("gda_fewshot", r"\.\n?<\|assistant\|>Kind:"),
    ],
)
def test_chat_template_starts_the_models_turn(task: str, turn: str) -> None:
    tokenizer = byte_tokenizer()
    [loaded] = task_manager(tokenizer=tokenizer, samples=1).load([task])["tasks"].values()
    document = loaded.test_docs()[0]
    lm = HFLM(pretrained=llama_model(), tokenizer=tokenizer, backend="causal", device="cpu")
    chat_prompt, plain = (
        loaded.fewshot_context(
            document,
            num_fewshot=0,
            apply_chat_template=chat,
            chat_template=lm.apply_chat_template,
            gen_prefix=loaded.doc_to_prefix(document),
        )
        for chat in (True, False)
    )
    assert re.search(turn + "$", chat_prompt.rstrip("\n"))
    of_needles = needles.NeedlePrompt(**document).text if task == "gda_needles" else None
    assert plain == (of_needles or document["text"] + document.get("prefix", "Kind:"))
    assert plain.split() == chat_prompt.replace("<|user|>", "").replace("<|assistant|>", " ").split()


@pytest.mark.slow
def test_pretrained_model_finds_needles() -> None:
    from gda.conversion.demo import find_demo_model
    from gda.conversion.sources.open import open_source

    try:
        source = open_source(find_demo_model())
    except FileNotFoundError as error:
        pytest.skip(str(error))
    tokenizer = source.tokenizer()
    lm = HFLM(pretrained=source.load(), tokenizer=tokenizer, backend="causal", batch_size=4, device="cpu")
    results = simple_evaluate(
        lm,
        tasks=["gda_needles_length_256", "gda_mqar_pairs_4"],
        task_manager=task_manager(tokenizer=tokenizer),
        bootstrap_iters=0,
    )
    assert results["results"]["gda_needles_length_256"]["acc,none"] >= 0.6
    assert results["results"]["gda_mqar_pairs_4"]["acc,none"] >= 0.6
