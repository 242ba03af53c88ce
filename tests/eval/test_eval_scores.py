"""Scores follow from a model's logits, for every way to run the evaluation."""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import gda

from ..support.evaluation import SHARED_DATA, log_likelihood, write_models
from ..support.llamas import byte_tokenizer

pytestmark = pytest.mark.slow

pytest.importorskip("lm_eval")
BLIMP = "blimp_passive_1"
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama, `llama`, its expansion, `gda`, a GDA model with non-zero λ, `live`, and `data`. Tests must not change
    it.
    """
    return write_models(tmp_path_factory.mktemp("scores"), "live")


def evaluate(folder: Path, model: str = "live", tasks: Any = BLIMP, **options: Any) -> dict[str, Any]:
    return gda.evaluate(folder / model, tasks=tasks, dataset_root=folder / "data", **options)


def answers(results: dict[str, Any], task: str = BLIMP) -> list[Any]:
    """The model's answer to each request of a task: (log-likelihood, is greedy) or a text."""
    return [answer for sample in results["samples"][task] for one in sample["resps"] for answer in one]


def likelihoods(results: dict[str, Any], task: str = BLIMP) -> torch.Tensor:
    return torch.tensor([float(answer[0]) for answer in answers(results, task)], dtype=torch.double)


# ------------------------------------------------------------------------------------------------------- against logits


@pytest.mark.parametrize("model", ["live", "gda", "llama"])
def test_log_likelihoods_follow_from_the_logits(model: str, folder: Path) -> None:
    """Summed token by token; an empty prompt is BOS."""
    results = evaluate(folder, model)
    loaded = AutoModelForCausalLM.from_pretrained(folder / model)
    tokenizer = AutoTokenizer.from_pretrained(folder / model)
    expected, right = [], []
    for sample in results["samples"][BLIMP]:
        both = [
            log_likelihood(loaded, tokenizer, "", f" {sample['doc'][name]}")
            for name in ("sentence_good", "sentence_bad")
        ]
        expected += both
        right.append(both[0] > both[1])
    assert len(expected) == 20
    torch.testing.assert_close(likelihoods(results), torch.tensor(expected).double(), atol=TOLERANCE, rtol=0)
    assert results["results"][BLIMP]["acc,none"] == sum(right) / len(right)


def test_few_shot_examples_in_prompts(folder: Path) -> None:
    """A task from a YAML file with two examples before each question, on local data."""
    results = evaluate(folder, tasks=str(folder / "data" / "toy_sums.yaml"), batch_size=3)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "live")
    tokenizer = AutoTokenizer.from_pretrained(folder / "live")
    expected = []
    for sample in results["samples"]["toy_sums"]:
        prompt = sample["arguments"][0][0]
        assert prompt.count("Question: ") == 3
        assert prompt.endswith(f"Question: {sample['doc']['question']}\nAnswer:")
        expected += [log_likelihood(loaded, tokenizer, prompt, f" {word}") for word in ("one", "two", "three and more")]
    found = likelihoods(results, "toy_sums")
    torch.testing.assert_close(found, torch.tensor(expected).double(), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("attention", "batch_size"),
    [("sdpa", 16), ("eager", 1), ("eager", 16), pytest.param("flex_attention", 16, marks=pytest.mark.slow)],
)
def test_backends_and_batch_sizes_agree(attention: str, batch_size: int, folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder / "live", attn_implementation=attention)
    tokenizer = AutoTokenizer.from_pretrained(folder / "live")
    tasks = [BLIMP, str(folder / "data" / "toy_sums.yaml")]
    options: dict[str, Any] = {"tasks": tasks, "dataset_root": folder / "data"}
    with torch.compiler.set_stance("force_eager"):  # compiling flex_attention takes ten seconds
        found = gda.evaluate(loaded, tokenizer, batch_size=batch_size, **options)
    expected = gda.evaluate(folder / "live", **options)
    for task in found["results"]:
        torch.testing.assert_close(likelihoods(found, task), likelihoods(expected, task), atol=TOLERANCE, rtol=0)
        assert found["results"][task] == expected["results"][task]


def test_expansion_scores_equal_the_source(folder: Path) -> None:
    """Likelihoods, generated texts and every metric."""
    tasks = [BLIMP, "gsm8k", "gda_copy_length_64"]
    options = {"tasks": tasks, "batch_size": 4, "num_fewshot": 1, "limit": 4}
    ours, source = evaluate(folder, "gda", **options), evaluate(folder, "llama", **options)
    for task in tasks:
        assert answers(ours, task) == answers(source, task)
        assert ours["results"][task] == source["results"][task]
    assert all(isinstance(answer, str) for answer in answers(ours, "gsm8k"))
    assert ours["n-shot"]["gsm8k"] == 1


def test_expanded_smollm2_scores_equal_smollm2(folder: Path, tmp_path: Path) -> None:
    """On BLiMP's own sentences if they are available."""
    from gda.conversion.demo import find_demo_model

    try:
        source = find_demo_model()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    gda.convert(source, tmp_path / "gda", verify=False)
    data = SHARED_DATA if (SHARED_DATA / "nyu-mll").is_dir() else folder / "data"
    options: dict[str, Any] = {"tasks": BLIMP, "dataset_root": data, "limit": 40, "batch_size": 16}
    ours, theirs = gda.evaluate(tmp_path / "gda", **options), gda.evaluate(source, **options)
    assert answers(ours) == answers(theirs)
    assert ours["results"] == theirs["results"]
    if data == SHARED_DATA:
        assert ours["results"][BLIMP]["acc,none"] > 0.6  # a trained model


# ------------------------------------------------------------------------------------------------------- ways to run it


def run(*arguments: object, cwd: Path) -> str:
    """Standard output of a Python program."""
    command = [sys.executable, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


@pytest.mark.parametrize("kind", ["gda", "hf"])
def test_lm_eval_command_line_gives_the_same_scores(kind: str, folder: Path, tmp_path: Path) -> None:
    """`python -m gda.eval run`, with our model type and with lm-eval's; it also knows our tasks."""
    tasks = [BLIMP, "gda_copy_length_64"]
    run(
        *("-m", "gda.eval", "run", "--model", kind, "--model_args", f"pretrained={folder / 'live'}", "--device", "cpu"),
        *("--tasks", ",".join(tasks), "--limit", 6, "--dataset_root", folder / "data", "--output_path", tmp_path),
        cwd=tmp_path,
    )
    (written,) = tmp_path.rglob("results_*.json")
    metrics = json.loads(written.read_text())["results"]
    expected = evaluate(folder, tasks=tasks, limit=6)["results"]
    for task in tasks:
        assert {name: metrics[task][name] for name in expected[task]} == pytest.approx(expected[task])


def test_two_processes_equal_one(folder: Path, tmp_path: Path) -> None:
    """`accelerate launch` on CPUs: processes share the documents, and one writes."""
    tasks = [BLIMP, "gsm8k"]
    printed = run(
        *("-m", "accelerate.commands.launch", "--cpu", "--num_processes", 2, "--num_machines", 1),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "-m", "gda.cli", "eval", folder / "live"),
        *("--tasks", ",".join(tasks), "--dataset-root", folder / "data", "--batch-size", 4, "--num-fewshot", 1),
        *("--limit", 5, "--baseline", folder / "gda", "--output", tmp_path / "out", "--json"),
        cwd=tmp_path,
    )
    report = json.loads(printed)
    assert report == json.loads((tmp_path / "out" / "results.json").read_text())
    for name, metrics in (("live", report["results"]), ("gda", report["gda"]["baseline"]["results"])):
        expected = evaluate(folder, name, tasks=tasks, batch_size=4, num_fewshot=1, limit=5)["results"]
        for task in tasks:
            assert {key: metrics[task][key] for key in expected[task]} == pytest.approx(expected[task])


def test_entry_point_of_lm_eval() -> None:
    """Later versions of lm-eval find the model type by it."""
    import importlib.metadata

    from lm_eval.api.registry import get_model

    (entry,) = importlib.metadata.entry_points(group="lm_eval.models", name="gda")
    assert entry.load() is get_model("gda")


def test_model_in_memory_is_not_changed(
    folder: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """It gives the scores of its folder; weights, mode and tokenizer stay, and git is not called."""
    loaded = AutoModelForCausalLM.from_pretrained(folder / "live")
    loaded.train()
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    tokenizer = byte_tokenizer()
    capfd.readouterr()
    found = gda.evaluate(loaded, tokenizer, tasks=[BLIMP], dataset_root=folder / "data", limit=0.5)
    assert found["results"] == evaluate(folder, limit=5)["results"]
    assert found["n-samples"][BLIMP] == {"original": 10, "effective": 5}
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())
    assert "fatal" not in capfd.readouterr().err
    assert "launch via accelerate" not in caplog.text  # lm-eval's advice for its own command line
    assert loaded.training
    assert tokenizer.pad_token is None
    json.dumps(found["configs"])


def test_seed_selects_the_few_shot_examples(folder: Path) -> None:
    task = str(folder / "data" / "toy_sums.yaml")
    prompts = [
        [sample["arguments"][0][0] for sample in evaluate(folder, tasks=task, seed=seed)["samples"]["toy_sums"]]
        for seed in (1, 1, 2)
    ]
    assert prompts[0] == prompts[1] != prompts[2]


DRAWING_TASK = """
task: toy_drawing
dataset_path: toy/sums
output_type: multiple_choice
training_split: train
validation_split: train
process_docs: !function drawing.draw
doc_to_text: "{{number}}"
doc_to_target: 0
doc_to_choice: ["one", "two"]
metric_list:
  - metric: acc
"""
DRAWING_CODE = "import random\n\ndef draw(docs):\n    return docs.map(lambda doc: {'number': random.random()})\n"


def test_documents_that_a_task_draws(folder: Path, tmp_path: Path) -> None:
    """The answer is scored for the document that was asked about, which is none of its own examples.

    The seed chooses the documents. They are in one split, as GPQA's are.
    """
    (tmp_path / "toy_drawing.yaml").write_text(DRAWING_TASK)
    (tmp_path / "drawing.py").write_text(DRAWING_CODE)
    asked = []
    for seed in (1, 1, 2):
        task = str(tmp_path / "toy_drawing.yaml")
        samples = evaluate(folder, tasks=task, seed=seed, num_fewshot=9)["samples"]["toy_drawing"]
        numbers = [str(sample["doc"]["number"]) for sample in samples]
        for number, sample in zip(numbers, samples, strict=True):
            *examples, question = re.findall(r"0\.\d+", sample["arguments"][0][0])
            assert question == number
            assert set(examples) == set(numbers) - {number}
        asked.append(numbers)
    assert asked[0] == asked[1] != asked[2]


ROLLING_TASK = """
task: toy_rolling
dataset_path: toy/sums
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: word_perplexity
"""


def test_shown_prompts_of_a_perplexity(folder: Path, tmp_path: Path) -> None:
    """The text is scored from its first token on."""
    from gda.eval.evaluate import evaluate_with_baseline

    (tmp_path / "toy_rolling.yaml").write_text(ROLLING_TASK)
    task, data = str(tmp_path / "toy_rolling.yaml"), folder / "data"
    report = evaluate_with_baseline(folder / "live", tasks=task, dataset_root=data, limit=3, show_prompts=2)
    assert report is not None
    shown = report.model.prompts
    assert [(each.prompt, each.continuation) for each in shown] == [("", "cat 0"), ("", "other man 1")]
    assert shown[0].prompt_ids == [0]
    assert shown[0].continuation_ids == byte_tokenizer()("cat 0", add_special_tokens=False).input_ids


def test_options_of_prompts_do_not_concern_a_perplexity(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A note says so, and the card does not list them. All windows have one bar."""
    from gda.eval.card import _arguments
    from gda.eval.evaluate import evaluate_with_baseline

    (tmp_path / "toy_rolling.yaml").write_text(ROLLING_TASK)
    options: dict[str, Any] = {"num_fewshot": 2, "apply_chat_template": True, "dataset_root": folder / "data"}
    console = Console(force_terminal=True)
    report = evaluate_with_baseline(
        folder / "live", tasks=str(tmp_path / "toy_rolling.yaml"), console=console, **options
    )
    assert report is not None
    (note,) = report.model.notes
    assert note.startswith("toy_rolling: --num-fewshot, --apply-chat-template had no effect")
    assert _arguments(report, "toy_rolling") == {"num_few_shot": 0}
    bars = re.findall(r"(Running \w+ requests): 100%.* (\d+)/(\d+) ", capsys.readouterr().err)
    assert bars == [("Running loglikelihood_rolling requests", "10", "10")]


@pytest.mark.parametrize("template", ["raise_exception('no system role')", "''"], ids=["refuses", "ignores"])
def test_chat_template_that_drops_system_messages(template: str, folder: Path) -> None:
    tokenizer = byte_tokenizer()
    drops = f"{{% if m.role == 'system' %}}{{{{ {template} }}}}{{% else %}}{{{{ m.content }}}}{{% endif %}}"
    tokenizer.chat_template = f"{{% for m in messages %}}{drops}{{% endfor %}}"
    model = AutoModelForCausalLM.from_pretrained(folder / "live")
    options = {"tokenizer": tokenizer, "apply_chat_template": True, "limit": 1, "dataset_root": folder / "data"}
    with pytest.warns(UserWarning, match="the chat template leaves out the system message"):
        gda.evaluate(model, tasks=BLIMP, system_instruction="Be brief.", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        gda.evaluate(model, tasks=BLIMP, **options)


def test_pad_token_without_an_embedding(folder: Path) -> None:
    """It is added to some fine-tuned models, and only fills batches."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    model = AutoModelForCausalLM.from_pretrained(folder / "live")
    assert tokenizer.pad_token_id >= model.config.vocab_size
    options = {"tasks": "gsm8k", "num_fewshot": 0, "dataset_root": folder / "data", "gen_kwargs": "max_gen_toks=4"}
    found = gda.evaluate(model, tokenizer, batch_size=2, **options)
    assert answers(found, "gsm8k") == answers(gda.evaluate(folder / "live", **options), "gsm8k")


def test_shown_prompts_equal_the_model_input(folder: Path) -> None:
    """Text and ids of the first requests of each task; lm-eval cuts the beginning of long prompts."""
    from gda.eval.evaluate import evaluate_with_baseline

    options: dict[str, Any] = {"tasks": [BLIMP, "gsm8k"], "dataset_root": folder / "data", "batch_size": 2}
    report = evaluate_with_baseline(folder / "live", limit=2, num_fewshot=7, show_prompts=1, **options)
    assert report is not None
    scored, generated = report.model.prompts
    tokenizer = byte_tokenizer()
    assert (scored.task, scored.prompt, scored.prompt_ids) == (BLIMP, "", [0])
    assert scored.continuation == " The cat thanked panther." or scored.continuation.startswith(" The cat")
    assert scored.continuation_ids == tokenizer(scored.continuation, add_special_tokens=False).input_ids
    assert generated.prompt.count("Question:") == 8
    assert generated.continuation is None
    ids = tokenizer(generated.prompt).input_ids
    assert generated.prompt_ids == ids[-(512 - 256) :]
    assert (scored.cut, generated.cut) == (0, len(ids) - 256)
    assert report.model.notes[0].startswith("gsm8k: 2 requests are longer than the 512 tokens")
    assert report.model.notes[1].startswith("blimp_passive_1: --num-fewshot 7 was ignored")


def test_chat_template_is_applied(folder: Path) -> None:
    task = str(folder / "data" / "toy_sums.yaml")
    found = evaluate(folder, tasks=task, apply_chat_template=True, limit=2)
    prompt = found["samples"]["toy_sums"][0]["arguments"][0][0]
    assert prompt.startswith("<|user|>Question: ")
    assert prompt.count("<|user|>") == 3
