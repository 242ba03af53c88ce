"""`gda eval` takes lm-eval's options and gives the answers of its `simple_evaluate`; local data of any kind."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")
import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import gda
from gda.eval.lm_eval.harness import GDALM
from gda.eval.lm_eval.local_data import data_from

from ..support.commands import Command
from ..support.evaluation import pairs, write_models
from ..support.llamas import byte_tokenizer
from ..support.tiny import tiny_model

pytestmark = pytest.mark.slow

BLIMP = "blimp_passive_1"
GENERATING = """
task: toy_words
dataset_path: toy/sums
output_type: generate_until
training_split: train
test_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{answer}}"
num_fewshot: 1
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list:
  - metric: exact_match
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GDA model, `live`, `data`, and the tasks toy_sums and toy_words in it. Tests must not change it."""
    folder = write_models(tmp_path_factory.mktemp("options"), "live")
    (folder / "data" / "toy_words.yaml").write_text(GENERATING)
    return folder


def lm_eval_results(folder: Path, task: str, **options: Any) -> Any:
    """What lm-eval's own evaluation gives."""
    root = folder / "data"
    with data_from(root):
        model = HFLM(str(folder / "live"), device="cpu", batch_size=1)
        manager = TaskManager(include_path=root, include_defaults=False)
        return simple_evaluate(model, tasks=[task], task_manager=manager, bootstrap_iters=0, **options)


SAME: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
    "gen_kwargs": (
        "toy_words",
        ["--gen-kwargs", "max_gen_toks=3,do_sample=true,temperature=0.7"],
        {"gen_kwargs": "max_gen_toks=3,do_sample=true,temperature=0.7"},
    ),
    "gen_kwargs as JSON": (
        "toy_words",
        ["--gen-kwargs", '{"until": ["a", ","], "max_gen_toks": 6}'],
        {"gen_kwargs": {"until": ["a", ","], "max_gen_toks": 6}},
    ),
    "system instruction": (
        "toy_sums",
        ["--system-instruction", "Think of a number.", "--num-fewshot", 3],
        {"system_instruction": "Think of a number.", "num_fewshot": 3},
    ),
    "chat": (
        "toy_words",
        ["--system-instruction", "Be brief.", "--apply-chat-template"],
        {"system_instruction": "Be brief.", "apply_chat_template": True},
    ),
    "no examples": ("toy_words", ["--num-fewshot", 0], {"num_fewshot": 0}),
}


@pytest.mark.parametrize("case", SAME)
def test_same_answers_as_lm_eval(case: str, folder: Path, tmp_path: Path, command: Command) -> None:
    """From definitions in --include-path, with the documents and answers that --log-samples writes."""
    task, arguments, options = SAME[case]
    root, out = folder / "data", tmp_path / "out"
    common = ("--dataset-root", root, "--include-path", root, "--output", out, "--log-samples", "--device", "cpu")
    outcome = command("eval", folder / "live", "--tasks", task, *common, *arguments)
    assert outcome.code == 0, outcome.error
    expected = lm_eval_results(folder, task, **options)
    scores = json.loads((out / "results.json").read_text())["results"][task]
    for name, score in expected["results"][task].items():
        if isinstance(score, float) and math.isfinite(score):
            assert scores[name] == pytest.approx(score, abs=1e-9), name
    samples = [json.loads(line) for line in (out / f"samples_{task}.jsonl").read_text().splitlines()]
    assert len(samples) == len(expected["samples"][task]) == 10
    for ours, theirs in zip(samples, expected["samples"][task], strict=True):
        assert ours["doc"] == theirs["doc"]
        assert ours["prompt_hash"] == theirs["prompt_hash"]
        assert ours["target"] == str(theirs["target"])
        assert [list(each.values()) for each in ours["arguments"].values()] == [
            json.loads(json.dumps(each)) for each in theirs["arguments"]
        ]
        if task == "toy_words":
            assert ours["resps"] == theirs["resps"]
        else:
            found, wanted = ([float(answer[0][0]) for answer in each["resps"]] for each in (ours, theirs))
            assert found == pytest.approx(wanted, abs=1e-4)


def test_code_runs_only_if_it_is_allowed(folder: Path, tmp_path: Path, command: Command) -> None:
    """lm-eval refuses such a task too, but only after the model was loaded."""
    (tmp_path / "toy_code.yaml").write_text(GENERATING.replace("toy_words", "toy_code") + "unsafe_code: true\n")
    run = ("eval", folder / "live", "--tasks", "toy_code", "--dataset-root", folder / "data", "--limit", 2)
    refused = command(*run, "--include-path", tmp_path)
    assert refused.code == 2
    message = refused.error.splitlines()[-1]
    assert message.startswith("gda: toy_code would run code that the model writes")
    assert "pass --confirm-run-unsafe-code" in message
    allowed = command(*run, "--include-path", tmp_path, "--confirm-run-unsafe-code", "--json")
    assert json.loads(allowed.out)["results"]["toy_code"]["exact_match,none"] == 0


def test_samples_of_both_models(folder: Path, tmp_path: Path, command: Command) -> None:
    """Each in its own file; a later run without them removes both."""
    out = tmp_path / "out"
    options = ("--tasks", BLIMP, "--dataset-root", folder / "data", "--limit", 2, "--output", out, "--baseline")
    assert command("eval", folder / "live", *options, folder / "gda", "--log-samples").code == 0
    files = [out / f"{prefix}samples_{BLIMP}.jsonl" for prefix in ("", "baseline_")]
    ours, theirs = (file.read_text().splitlines() for file in files)
    assert (len(ours), len(theirs)) == (2, 2)
    assert ours != theirs
    assert command("eval", folder / "live", *options, folder / "gda", "--overwrite").code == 0
    assert not any(file.exists() for file in files)


REFUSED: dict[str, tuple[list[Any], tuple[str, ...]]] = {
    "samples without a folder": (["--log-samples"], ("--log-samples", "--output; name both")),
    "gen_kwargs": (
        ["--gen-kwargs", "temperature"],
        ("--gen-kwargs temperature is neither", "temperature=0.7,do_sample"),
    ),
    "gen_kwargs of JSON": (["--gen-kwargs", "{"], ("--gen-kwargs { is not JSON",)),
    "include path": (["--include-path", "nowhere"], ("--include-path nowhere is not a folder",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_options_are_refused(case: str, folder: Path, command: Command) -> None:
    arguments, words = REFUSED[case]
    outcome = command("eval", folder / "live", "--tasks", BLIMP, *arguments)
    assert outcome.code == 2
    last = outcome.error.strip().splitlines()[-1]
    for word in words:
        assert word in last


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("temperature=0.7", "temperature has no effect on the task toy_words, where do_sample is false; add do_sample"),
        ("do_sample=true", "do_sample has no effect on the task toy_words, where temperature is 0; add temperature"),
        (
            "max_new_tokens=4",
            "max_new_tokens has no effect on the task toy_words, which sets max_gen_toks; use max_gen",
        ),
        ('{"temperature": [0.7]}', "--gen-kwargs: temperature [0.7] is not a number"),
        ("temprature=0.7", "--gen-kwargs: generation has no argument temprature; did you mean temperature?"),
    ],
)
def test_arguments_of_generation_without_effect(
    given: str, words: str, folder: Path, tmp_path: Path, command: Command
) -> None:
    """lm-eval takes the task's own, and warns only in its log. The error comes before the model is loaded."""
    (tmp_path / "t.yaml").write_text(GENERATING.replace("max_gen_toks: 8", "max_gen_toks: 8, do_sample: false"))
    run = ("eval", folder / "live", "--tasks", tmp_path / "t.yaml", "--dataset-root", folder / "data", "--gen-kwargs")
    outcome = command(*run, given)
    assert outcome.code == 2
    assert words in outcome.error
    assert "running" not in outcome.error
    assert command(*run, "temperature=0.7,do_sample=true,max_gen_toks=2").code == 0
    outcome = command("eval", folder / "live", "--tasks", "gda_mqar", "--gen-kwargs", "do_sample=true")
    assert outcome.error.endswith(
        "gda: --gen-kwargs has no effect, because none of the tasks generates text; omit it\n"
    )


# ------------------------------------------------------------------------------------------ batch sizes and few shots


@pytest.mark.parametrize("size", ["auto", "auto:4", "auto:100"])
def test_automatic_batch_size(size: str, folder: Path) -> None:
    """Any number of parts, also with fewer requests, gives the scores of batches of one."""
    options: dict[str, Any] = {"tasks": BLIMP, "dataset_root": folder / "data"}
    for limit in (1, 10):
        found = gda.evaluate(folder / "live", batch_size=size, limit=limit, **options)
        expected = gda.evaluate(folder / "live", limit=limit, **options)
        assert found["results"] == expected["results"]


def test_batch_size_of_each_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found at the first batch that begins in a part, and no more once it is the largest allowed."""
    lm = GDALM(tiny_model(vocab_size=len(byte_tokenizer())), tokenizer=byte_tokenizer(), batch_size="auto:4")
    detected: list[int] = []

    def detect(self: Any, requests: Any, pos: int) -> int:
        detected.append(pos)
        return {0: 9, 9: 3, 12: 64}[pos]

    monkeypatch.setattr(GDALM, "_detect_batch_size", detect)
    lm.batch_sizes, lm.max_batch_size = {}, 64
    assert [lm._batch_scheduler(pos, [None] * 12) for pos in (0, 9, 10, 11)] == [9, 3, 3, 3]  # the first skips parts
    assert lm._batch_scheduler(12, [None] * 12) == 64
    assert lm._batch_scheduler(15, [None] * 12) == 64
    assert detected == [0, 9, 12]


@pytest.mark.parametrize("task", ["toy_sums", "first"])
def test_more_examples_than_documents(task: str, folder: Path, tmp_path: Path, command: Command) -> None:
    """One line with the task, the number of its documents and the remedy, for each of lm-eval's samplers."""
    text = (folder / "data" / "toy_sums.yaml").read_text()
    (tmp_path / "first.yaml").write_text(
        text.replace("toy_sums", "first") + "fewshot_config: {sampler: first_n, split: train}\n"
    )
    options = ("--dataset-root", folder / "data", "--num-fewshot", 30)
    definition = folder / "data" / "toy_sums.yaml" if task == "toy_sums" else tmp_path / "first.yaml"
    outcome = command("eval", folder / "live", "--tasks", definition, *options)
    assert outcome.code == 2
    assert outcome.error.strip().splitlines()[-1] == (
        f"gda: task {task}: 30 few-shot examples are more than fit, because the task draws them from 10 documents; "
        "lower --num-fewshot, or add documents"
    )


# ---------------------------------------------------------------------------------------------------------- local data


README = """---
configs:
- config_name: passive_1
  data_files:
  - split: train
    path: files/passive_1_en.jsonl
---
"""


def write_blimp(kind: str, base: Path) -> None:
    """BLiMP's passive_1 as `hf download` and `save_to_disk` leave it."""
    rows = pa.Table.from_pylist(pairs())
    place = base / "passive_1"
    place.mkdir(parents=True)
    if kind == "shards":
        for shard, part in enumerate((rows[:4], rows[4:])):
            pq.write_table(part, place / f"train-{shard:05d}-of-00002.parquet")
        (base / "README.md").write_text("# BLiMP")
    elif kind == "saved":
        datasets.DatasetDict({"train": datasets.Dataset(rows)}).save_to_disk(place)
    elif kind == "saved split":
        datasets.Dataset(rows, split="train").save_to_disk(place)
    else:
        shutil.rmtree(place)
        (base / "files").mkdir()
        (base / "files" / "passive_1_en.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs()))
        (base / "README.md").write_text(README)


@pytest.mark.parametrize("kind", ["shards", "saved", "saved split", "card"])
def test_datasets_as_downloaded_or_saved(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same scores as with a file SPLIT.jsonl."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_blimp(kind, tmp_path / "root/nyu-mll/blimp")
    found = gda.evaluate(folder / "live", tasks=BLIMP, dataset_root=tmp_path / "root")
    expected = gda.evaluate(folder / "live", tasks=BLIMP, dataset_root=folder / "data")
    assert found["results"] == expected["results"]
    assert found["n-samples"][BLIMP]["effective"] == 10


def test_data_folder_of_a_dataset_without_configurations(tmp_path: Path) -> None:
    """`data/SPLIT-00000-of-00001.parquet`, whatever the split is called."""
    from gda.eval.lm_eval.local_data import load_local

    (tmp_path / "d/data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(pairs()), tmp_path / "d/data/auxiliary_train-00000-of-00001.parquet")
    for name in (None, "default"):
        assert list(load_local(tmp_path, "d", name)) == ["auxiliary_train"]
    with pytest.raises(FileNotFoundError, match=r"test\.jsonl \(or \.parquet\) is missing"):
        load_local(tmp_path, "d", None, "test")


def test_card_without_the_configuration(folder: Path, tmp_path: Path, command: Command) -> None:
    """One line with what the card has."""
    write_blimp("card", tmp_path / "nyu-mll/blimp")
    card = tmp_path / "nyu-mll/blimp/README.md"
    card.write_text(card.read_text().replace("config_name: passive_1", "config_name: other"))
    outcome = command("eval", folder / "live", "--tasks", BLIMP, "--dataset-root", tmp_path)
    assert outcome.code == 2
    assert "'passive_1' not found. Available: ['other']" in outcome.error.strip().splitlines()[-1]
