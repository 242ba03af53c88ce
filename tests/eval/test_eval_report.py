"""The report of `gda eval`: comparison, JSON, Markdown, HTML and the model card."""

import html
import json
import math
import random
import re
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import gda
from gda.common.files import sha256

from ..support.browser import Page, opened
from ..support.commands import Command
from ..support.evaluation import write_models
from ..support.llamas import byte_tokenizer, files_of

pytest.importorskip("lm_eval")
from gda.commands import eval as eval_command
from gda.eval import evaluate as evaluate_module
from gda.eval.card import update_card
from gda.eval.compare import compare
from gda.eval.evaluate import evaluate_with_baseline
from gda.eval.report import EvalReport, _facts

pytestmark = pytest.mark.slow

BLIMP = "blimp_passive_1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama, `llama`, its expansion, `gda`, another model, `other`, and `data`. Tests must not change it."""
    return write_models(tmp_path_factory.mktemp("report"), "other")


# ----------------------------------------------------------------------------------------------------------- comparison


def results(scores: dict[str, float], values: dict[int, float] | None = None, name: str = "acc") -> dict[str, Any]:
    """lm-eval's dictionary for a task `t`."""
    samples = [{"doc_id": document, "filter": "none", name: value} for document, value in (values or {}).items()]
    return {"results": {"t": {"alias": "t", "sample_len": 4, **scores}}, "samples": {"t": samples}}


def test_standard_error_of_paired_differences() -> None:
    """Both models answered the same documents, so the spread of the differences counts."""
    ours = {0: 1.0, 1: 1.0, 2: 0.0, 3: 1.0}
    theirs = {0: 1.0, 1: 0.0, 2: 0.0, 3: 1.0}
    (row,) = compare(
        results({"acc,none": 0.75, "acc_stderr,none": 0.25}, ours),
        results({"acc,none": 0.5, "acc_stderr,none": 0.29}, theirs),
    )
    assert (row.score, row.baseline, row.difference) == (0.75, 0.5, 0.25)
    assert row.difference_stderr == pytest.approx(0.5 / math.sqrt(4))  # of 0, 1, 0, 0
    assert row.within is True


def test_standard_error_of_a_group() -> None:
    """The documents of all its tasks are paired, also of those in a group inside it."""
    sizes, groups = {"a": 3, "b": 5}, {"outer": ["inner", "a"], "inner": ["b"]}
    generator = random.Random(0)

    def scored() -> dict[str, Any]:
        values = {task: [generator.random() for _ in range(size)] for task, size in sizes.items()}
        samples = {
            task: [{"doc_id": document, "filter": "none", "acc": value} for document, value in enumerate(of_task)]
            for task, of_task in values.items()
        }
        mean = sum(map(sum, values.values())) / 8
        outer = {"outer": {"acc,none": mean, "acc_stderr,none": 1.0}}
        return {"results": outer, "group_subtasks": groups, "samples": samples}

    ours, theirs = scored(), scored()
    (row,) = compare(ours, theirs)
    differences = [
        one["acc"] - other["acc"]
        for task in sizes
        for one, other in zip(ours["samples"][task], theirs["samples"][task], strict=True)
    ]
    assert row.difference_stderr == pytest.approx(statistics.stdev(differences) / math.sqrt(8))


def test_standard_error_of_unpaired_scores() -> None:
    """A perplexity, and scores of unknown documents."""
    for values in ({}, {0: -3.0, 1: -4.0}):
        ours = results({"word_perplexity,none": 20.0, "word_perplexity_stderr,none": 3.0}, values, "word_perplexity")
        theirs = results({"word_perplexity,none": 31.0, "word_perplexity_stderr,none": 4.0}, values, "word_perplexity")
        (row,) = compare(ours, theirs)
        assert (row.difference, row.difference_stderr, row.within) == (-11.0, 5.0, False)


def test_unknown_errors_give_no_verdict() -> None:
    """Unless the scores are equal. A metric that the baseline lacks has no difference."""
    unknown = {"acc,none": 0.5, "acc_stderr,none": "N/A"}
    assert compare(results(unknown), results({"acc,none": 0.4}))[0].within is None
    assert compare(results(unknown), results(unknown))[0].within is True
    (alone,) = compare(results({"acc,none": 0.5, "acc_stderr,none": 0.1}), results({}))
    assert (alone.baseline, alone.difference, alone.within, alone.stderr) == (None, None, None, 0.1)
    assert [row.label for row in compare(results({"exact_match,strict-match": 1.0}))] == ["exact_match strict-match"]


# ---------------------------------------------------------------------------------------------------------------- files


def test_existing_results_need_overwrite(folder: Path, tmp_path: Path, command: Command) -> None:
    """Refused before anything runs. --overwrite replaces all files and removes the report of older results."""
    (tmp_path / "text.txt").write_text("A text to read. " * 10)
    run = ("eval", folder / "gda", "--perplexity", tmp_path / "text.txt", "--output", tmp_path / "out")
    assert command(*run, "--html").code == 0
    before = files_of(tmp_path / "out")
    outcome = command(*run)
    assert outcome.code == 2
    assert "results.json already exists; choose another path or pass --overwrite" in outcome.error
    assert files_of(tmp_path / "out") == before
    assert command(*run, "--overwrite").code == 0
    assert files_of(tmp_path / "out").keys() == {"results.json", "results.md"}


@pytest.mark.parametrize("name", ["results.md", "report.html", "samples_mine.jsonl", "baseline_samples_mine.jsonl"])
def test_files_of_others_are_refused(name: str, folder: Path, tmp_path: Path, command: Command) -> None:
    """A folder without results.json may hold files of the same names, written by someone else."""
    (tmp_path / "text.txt").write_text("A text to read. " * 10)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    (tmp_path / "out/notes.jsonl").write_text("mine")
    before = files_of(tmp_path / "out")
    run = ("eval", folder / "gda", "--perplexity", tmp_path / "text.txt", "--output", tmp_path / "out")
    outcome = command(*run)
    assert outcome.code == 2
    assert f"{name} already exists; choose another path or pass --overwrite" in outcome.error
    assert "running" not in outcome.error
    assert files_of(tmp_path / "out") == before
    assert command(*run, "--overwrite").code == 0
    assert files_of(tmp_path / "out").keys() == {"results.json", "results.md", "notes.jsonl"}


def test_perplexity_ratio(folder: Path, tmp_path: Path, command: Command) -> None:
    """In JSON, Markdown and HTML with its interval, if there is a baseline."""
    (tmp_path / "text.txt").write_text("A text to read. " * 10)
    run = ("eval", folder / "other", "--perplexity", tmp_path / "text.txt", "--context", 32)
    out = ("--output", tmp_path / "out", "--html")
    outcome = command(*run, "--baseline", folder / "llama", *out, "--json")
    ours = json.loads(outcome.out)["gda"]
    ratio = ours["perplexity"]["token"] / ours["baseline"]["gda"]["perplexity"]["token"]
    assert ours["perplexity_ratio"] == pytest.approx(ratio)
    low, high = ours["perplexity_ratio_interval"]
    assert low < ratio < high
    for name in ("results.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert f"{ratio:.4f}" in text
        assert f"{low:.4f} to {high:.4f}" in text
    assert json.loads(command(*run, "--json").out)["gda"]["perplexity_ratio"] is None


def test_results_are_written_before_they_are_printed(
    folder: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Standard output may be closed."""

    def closed(*_: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(eval_command, "_print", closed)
    model = shutil.copytree(folder / "other", tmp_path / "model")
    run = ("eval", model, "--tasks", BLIMP, "--dataset-root", folder / "data", "--limit", 1)
    command(*run, "--output", tmp_path / "out", "--update-card", "--json")
    assert json.loads((tmp_path / "out" / "results.json").read_text())["results"][BLIMP]
    assert BLIMP in (model / "README.md").read_text()


def test_a_failing_baseline_keeps_the_models_results(folder: Path, tmp_path: Path, command: Command) -> None:
    """They are printed and written, with a note, before the command fails."""
    (tmp_path / "text.txt").write_text("A text to read. " * 10)
    damaged = shutil.copytree(folder / "llama", tmp_path / "damaged")
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.norm.weight"].fill_(math.nan)
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    run = ("eval", folder / "other", "--perplexity", tmp_path / "text.txt")
    alone = json.loads(command(*run, "--json").out)["gda"]
    outcome = command(*run, "--baseline", damaged, "--output", tmp_path / "out")
    assert outcome.code == 2
    assert "--perplexity is nan" in outcome.error.splitlines()[-1]
    written = json.loads((tmp_path / "out" / "results.json").read_text())["gda"]
    assert written["perplexity"] == alone["perplexity"]
    assert written["baseline"] is None
    assert any(note.startswith("damaged failed: --perplexity is nan") for note in written["notes"])


def test_ctrl_c_during_the_diagnostics_keeps_both_results(
    folder: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 130; the card is left as it was."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate_module, "diagnose", interrupted)
    (tmp_path / "text.txt").write_text("A text to read. " * 10)
    run = ("eval", folder / "other", "--baseline", folder / "llama", "--perplexity", tmp_path / "text.txt")
    outcome = command(*run, "--diagnostics", "--json")
    assert outcome.code == 130
    found = json.loads(outcome.out)["gda"]
    assert found["perplexity_ratio"] > 0
    assert "the diagnostics failed: interrupted" in found["notes"]


def test_report_files(folder: Path, tmp_path: Path, command: Command) -> None:
    """lm-eval's format with baseline, settings, versions and hashes under "gda", and a Markdown table."""
    outcome = command(
        *("eval", folder / "other", "--baseline", folder / "gda", "--tasks", f"{BLIMP},gsm8k", "--limit", 4),
        *("--dataset-root", folder / "data", "--num-fewshot", 1, "--batch-size", 2, "--json"),
        *("--output", tmp_path / "a" / "b", "--html", "--seed", 3),
    )
    assert outcome.code == 0, outcome.error
    written = json.loads((tmp_path / "a/b/results.json").read_text())
    assert written == json.loads(outcome.out)
    expected = gda.evaluate(
        folder / "other", tasks=f"{BLIMP},gsm8k", dataset_root=folder / "data", limit=4, num_fewshot=1, seed=3
    )
    assert written["results"] == expected["results"]
    assert written.keys() - {"gda"} == expected.keys() - {"samples"}
    ours = written["gda"]
    assert ours["sha256"] == {"model.safetensors": sha256(folder / "other/model.safetensors")}
    assert ours["baseline"]["gda"]["sha256"] == {"model.safetensors": sha256(folder / "gda/model.safetensors")}
    assert ours["versions"]["gda"] == gda.__version__
    assert ours["notes"] == [
        f"{BLIMP}: --num-fewshot 1 was ignored; the task's definition fixes the number of examples"
    ]
    assert f"note on other: {ours['notes'][0]}" in outcome.error
    assert (ours["dtype"], ours["prompts"]) == ("float32", [])
    assert (ours["settings"]["seed"], ours["settings"]["batch_size"]) == (3, "2")
    assert "limit 4, " in (tmp_path / "a/b/results.md").read_text()
    assert ours["settings"].keys().isdisjoint({"output", "html", "overwrite"})  # places are no settings
    by_task = {row["task"]: row for row in ours["comparison"]}
    assert by_task[BLIMP]["score"] == expected["results"][BLIMP]["acc,none"]
    assert by_task[BLIMP]["baseline"] == ours["baseline"]["results"][BLIMP]["acc,none"]
    table = (tmp_path / "a/b/results.md").read_text().splitlines()
    assert table[0] == "| task | metric | other | gda | difference | ≤ 2 stderr |"
    assert table[2].startswith(f"| {BLIMP} | acc | {by_task[BLIMP]['score']:.4f} ± ")
    assert sorted(path.name for path in (tmp_path / "a/b").iterdir()) == ["report.html", "results.json", "results.md"]


def test_output_on_the_screen(folder: Path, command: Command) -> None:
    """Full names, scores with errors, the verdict and prompts; progress goes to standard error."""
    outcome = command(
        *("eval", folder / "gda", "--baseline", folder / "llama", "--tasks", BLIMP, "--limit", 6),
        *("--dataset-root", folder / "data", "--show-prompts", 2),
    )
    assert outcome.code == 0, outcome.error
    assert re.search(rf"{BLIMP} .* acc .* \+0\.0000 .* yes", outcome.out)
    assert outcome.out.count("  prompt  ''\n          [0]\n") == 2
    assert "scored  ' The cat thanked " in outcome.out
    assert "running gda (1 of 2)\nscoring 12 requests of tasks\nrunning llama (2 of 2; gda took " in outcome.error
    assert "it/s" not in outcome.error  # no progress bar


def test_page_is_self_contained_and_escapes_names(folder: Path, tmp_path: Path, command: Command) -> None:
    name = "<b onload=alert(1)>[red]|`&"
    named = copy_of(folder / "gda", tmp_path / name, None)
    outcome = command(
        *("eval", named, "--baseline", folder / "llama", "--tasks", BLIMP, "--dataset-root", folder / "data"),
        *("--output", tmp_path / "out", "--html", "--show-prompts", 1),
    )
    assert outcome.code == 0, outcome.error
    text = (tmp_path / "out/report.html").read_text()
    page = Page(text)
    assert page.addresses == []
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert html.escape(name) in text
    assert "prefers-color-scheme: dark" in text
    assert page.tags.count("rect") == 2 + 2  # two in the legend, two bars
    markdown = (tmp_path / "out/results.md").read_text()
    assert "<b" not in markdown
    assert markdown.splitlines()[0].replace("\\|", "").count("|") == 7
    assert name in outcome.out


def test_every_column_is_visible_on_a_narrow_screen(folder: Path, tmp_path: Path, command: Command) -> None:
    """The verdict is the last column; at 1,400 px it was cut off."""
    outcome = command(
        *("eval", folder / "gda", "--baseline", folder / "llama", "--tasks", BLIMP, "--limit", 4),
        *("--dataset-root", folder / "data", "--output", tmp_path, "--html"),
    )
    assert outcome.code == 0, outcome.error
    with opened(tmp_path / "report.html", width=1400, ready="table") as page:
        wide = page.locator(".wide")
        assert wide.count() == page.locator("table").count() + page.locator("figure").count() > 1
        assert wide.evaluate_all("all => all.every(each => each.scrollWidth <= each.clientWidth)")
        assert page.evaluate("document.documentElement.scrollWidth") <= 1400


def test_diagnostics_are_in_every_form_of_the_report(folder: Path, tmp_path: Path, command: Command) -> None:
    """On the screen and in JSON, Markdown and HTML; settings of the retrieval tasks apply."""
    arguments = (
        *("eval", folder / "gda", "--baseline", folder / "llama", "--diagnostics", "--output", tmp_path, "--html"),
        *("--metadata", '{"length": 400, "depth": 0.5, "samples": 3, "digits": 5, "data_seed": 7}'),
    )
    printed = command(*arguments)
    assert printed.code == 0, printed.error
    assert "noise" in printed.out
    output = json.loads((tmp_path / "results.json").read_text())["gda"]
    assert output["diagnostics"]["lambdas"] == [0.0, 0.0]
    assert output["comparison"] == []
    from gda.eval.attention.diagnostics import DEFAULTS, diagnose, read_texts

    ours, llama = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("gda", "llama"))
    settings = replace(DEFAULTS, length=400, digits=5, depth=0.5, samples=3, data_seed=7)
    expected = diagnose(ours, read_texts(settings, byte_tokenizer()), settings, baseline=llama)
    assert output["diagnostics"] == json.loads(json.dumps(expected.to_dict()))
    assert expected.to_markdown().strip() in (tmp_path / "results.md").read_text()
    page = (tmp_path / "report.html").read_text()
    assert html.escape(expected.to_markdown().splitlines()[0]) in page
    assert "| layer |" not in page  # tables, not Markdown
    assert Page(page).tags.count("table") == len(expected.tables())
    assert page.count('<div class="wide">') == page.count("<table")  # a wide one can be scrolled


def test_two_models_with_the_same_name(folder: Path, tmp_path: Path, command: Command) -> None:
    """They are named by their paths, and "(baseline)" if a model is compared with itself."""
    outcome = command(
        *("eval", folder / "gda", "--baseline", folder / "gda", "--tasks", BLIMP, "--limit", 2, "--json"),
        *("--dataset-root", folder / "data"),
    )
    output = json.loads(outcome.out)["gda"]
    assert output["model"] == str(folder / "gda")
    assert output["baseline"]["gda"]["model"] == f"{folder / 'gda'} (baseline)"


# ----------------------------------------------------------------------------------------------------------- model card


def copy_of(folder: Path, place: Path, card: str | None) -> Path:
    place.mkdir()
    for file in folder.iterdir():
        if file.name != "README.md":
            (place / file.name).write_bytes(file.read_bytes())
    if card is not None:
        (place / "README.md").write_text(card, newline="")
    return place


@pytest.fixture(scope="module")
def report(folder: Path) -> EvalReport:
    """BLiMP on the model `gda`. Tests must not change it."""
    found = evaluate_with_baseline(folder / "gda", tasks=BLIMP, dataset_root=folder / "data")
    assert found is not None
    return found


def updated(model: Path, report: EvalReport) -> str:
    return update_card(model, report).read_bytes().decode()


CARD = """---
license:   apache-2.0   # kept as it is
model-index:
- name: somebody's
  results:
  - task: {type: text-generation}
    dataset: {type: x/y, name: Other task}
    metrics:
    - {type: acc, value: 0.25}
tags: [a,   b]
---

# Title
Words — and   more.
"""


def test_update_card(folder: Path, tmp_path: Path, command: Command) -> None:
    """Other results, fields and text are kept; a repeated run changes nothing; a limited run is another result."""
    model = copy_of(folder / "gda", tmp_path / "m", CARD)
    arguments = ("eval", model, "--tasks", BLIMP, "--dataset-root", folder / "data", "--update-card")
    texts = []
    for options in ((), (), ("--limit", 4)):
        outcome = command(*arguments, *options)
        assert outcome.code == 0, outcome.error
        texts.append((model / "README.md").read_text())
    assert texts[0] == texts[1]
    assert texts[0].endswith(CARD[CARD.index("---\n\n# Title") :])
    metadata, before = (yaml.safe_load(text.split("---\n")[1]) for text in (texts[0], CARD))
    assert list(metadata) == list(before)
    assert {**metadata, "model-index": None} == {**before, "model-index": None}
    assert metadata["model-index"][0]["results"][0] == before["model-index"][0]["results"][0]
    card = ModelCard(texts[0])
    assert {result.dataset_name for result in card.data.eval_results} == {"Other task", BLIMP}
    (ours,) = (result for result in card.data.eval_results if result.dataset_name == BLIMP)
    expected = gda.evaluate(model, tasks=BLIMP, dataset_root=folder / "data")["results"][BLIMP]["acc,none"]
    assert (ours.metric_type, ours.metric_value, ours.dataset_type) == ("acc", expected, "nyu-mll/blimp")
    assert (ours.dataset_config, ours.dataset_split, ours.dataset_args) == ("passive_1", "train", {"num_few_shot": 0})
    assert texts[2].count(f"name: {BLIMP}") == 2
    assert "limit: 4" in texts[2]


@pytest.mark.parametrize("card", [None, "# Only a title\n", "---\n---\nText", CARD.replace("\n", "\r\n")])
def test_any_card_can_be_updated(card: str | None, folder: Path, report: EvalReport, tmp_path: Path) -> None:
    """A missing card, one without metadata, with empty metadata, and with Windows line ends."""
    model = copy_of(folder / "gda", tmp_path / "m", card)
    text = updated(model, report)
    assert updated(model, report) == text
    assert BLIMP in {result.dataset_name for result in ModelCard(text).data.eval_results}
    assert text.endswith((card or "# m\n").split("---")[-1].lstrip("\r\n"))


def test_other_settings_make_another_result(report: EvalReport) -> None:
    """Metadata, template, dtype, and the limit of a group."""
    from gda.eval.card import _arguments

    options = replace(report.options, limit=4, metadata={"length": 64}, apply_chat_template=True, dtype="bfloat16")
    options = replace(options, gen_kwargs={"temperature": 0.7}, system_instruction="Be brief.", seed=5)
    assert _arguments(replace(report, options=options), "a_group") == {
        "limit": 4,
        "dtype": "bfloat16",
        "apply_chat_template": True,
        "metadata": {"length": 64},
        "gen_kwargs": {"temperature": 0.7},
        "system_instruction": "Be brief.",
        "seed": 5,
    }


def test_settings_that_are_zero_are_facts(report: EvalReport) -> None:
    """Without --num-fewshot, a task's own number counts."""
    options = replace(report.options, num_fewshot=0, seed=0)
    (settings,) = (fact for name, fact in _facts(replace(report, options=options)) if name == "settings")
    assert {"num_fewshot 0", "seed 0"} <= set(settings.split(", "))


def test_invalid_card_is_refused_before_the_run(folder: Path, tmp_path: Path, command: Command) -> None:
    model = copy_of(folder / "gda", tmp_path / "m", "---\n- a\n---\n")
    outcome = command("eval", model, "--tasks", BLIMP, "--dataset-root", folder / "data", "--update-card")
    assert outcome.code == 2
    assert "its metadata is not valid" in outcome.error
    assert "running" not in outcome.error


def test_report_html_of_an_earlier_run_is_removed(report: EvalReport, tmp_path: Path) -> None:
    """NaN and infinity are null in JSON."""
    from gda.eval.report import to_json, write_report

    write_report(report, tmp_path, with_html=True)
    write_report(report, tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "results.md"]
    row = replace(report.rows[0], score=math.nan, stderr=math.inf)
    output = json.loads(to_json(replace(report, rows=[row])), parse_constant=pytest.fail)
    assert (output["gda"]["comparison"][0]["score"], output["gda"]["comparison"][0]["stderr"]) == (None, None)


def test_context_above_the_models_limit_is_noted(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The cat thanked the hen.")
    found = evaluate_with_baseline(folder / "gda", perplexity=tmp_path / "text.txt", context=600)
    assert found is not None
    assert found.model.notes == ["perplexity: the model reads 512 tokens at a time, not 600"]


def test_card_of_a_conversion_keeps_its_bytes(folder: Path, report: EvalReport, tmp_path: Path) -> None:
    """All except the model-index."""
    before = (folder / "gda/README.md").read_text()
    text = updated(copy_of(folder / "gda", tmp_path / "m", before), report)
    front = text.split("---\n")[1]
    added = front[front.index("model-index:") :]
    assert text.replace(added, "") == before
    assert yaml.safe_load(front)["model-index"][0]["name"] == "m"


@pytest.mark.parametrize("card", ["---\n a: [\n---\n", "---\nmodel-index: 3\n---\n", "---\n- a\n---\n"])
def test_invalid_card_is_refused(card: str, folder: Path, report: EvalReport, tmp_path: Path) -> None:
    """The error names it, and the file does not change."""
    model = copy_of(folder / "gda", tmp_path / "m", card)
    with pytest.raises(ValueError, match=r"README.md: its metadata is not valid"):
        update_card(model, report)
    assert (model / "README.md").read_text() == card


def test_a_score_that_is_not_finite_is_left_out(folder: Path, report: EvalReport, tmp_path: Path) -> None:
    """And so is an earlier score of that task."""
    model = copy_of(folder / "gda", tmp_path / "m", None)
    other = replace(report.rows[0], task="other", score=0.5)
    for score, tasks in ((0.5, {BLIMP, "other"}), (math.nan, {BLIMP})):
        text = updated(model, replace(report, rows=[replace(other, score=score), *report.rows]))
        assert {result.dataset_name for result in ModelCard(text).data.eval_results} == tasks
