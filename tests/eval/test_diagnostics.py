"""Attention on the answer of retrieval prompts, compared with loops over characters and tokens, and its report."""

import json
import math
from dataclasses import asdict, astuple, replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel

from gda import convert
from gda.eval.attention.diagnostics import (
    DEFAULTS,
    AttentionShares,
    DiagnosticsReport,
    diagnose,
    read_prompt_settings,
    read_texts,
)
from gda.eval.evaluate import evaluate_with_baseline
from gda.eval.tasks import TASKS_FOLDER
from gda.eval.tasks.needles import DEPTHS, NeedlePrompt, NeedleSettings, make_prompts
from gda.eval.tasks.settings import tokens_of

from ..support.llamas import VOCAB_SIZE, byte_tokenizer, llama_model, save_llama
from ..support.tiny import tiny_model

LENGTH, NEEDLES = 400, 3


def gda_model(**changes: Any) -> PreTrainedModel:
    return tiny_model(**({"vocab_size": VOCAB_SIZE, "max_position_embeddings": 1024} | changes))


def report_of(model: PreTrainedModel, *, baseline: PreTrainedModel | None = None, **settings: Any) -> DiagnosticsReport:
    chosen = replace(DEFAULTS, **({"length": LENGTH, "needles": NEEDLES, "samples": len(DEPTHS)} | settings))
    return diagnose(model, read_texts(chosen, byte_tokenizer()), chosen, baseline=baseline)


def counted(maps: torch.Tensor, prompt: NeedlePrompt, tokenizer: Any) -> tuple[float, float, float, float]:
    """Shares of one layer's maps (H, T, T) for a prompt with its answer, computed token by token."""
    encoded = tokenizer(prompt.text + prompt.target, return_offsets_mapping=True)
    offsets, message = encoded["offset_mapping"], len(prompt.text)
    rows = [index - 1 for index, (_, end) in enumerate(offsets) if end > message]
    sums = [0.0] * 4
    for head in maps.double():
        for row in rows:
            magnitudes = [abs(value) for value in head[row].tolist()]
            total = sum(magnitudes)
            for index, (magnitude, (start, end)) in enumerate(zip(magnitudes, offsets, strict=True)):
                share = magnitude / total
                sums[3] -= share * math.log(share) if share else 0.0
                if index == 0:
                    sums[2] += share
                elif start < prompt.answer_end and end > prompt.answer_start:
                    sums[0] += share
                elif start < len(prompt.context):
                    sums[1] += share
    return tuple(value / len(maps) / len(rows) for value in sums)  # type: ignore[return-value]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kv_layout": "paired", "num_key_value_heads": 4, "lambda_type": "sigmoid"},
        {"sliding_window": 50, "layer_types": ["full_attention", "sliding_attention"]},
    ],
    ids=["shared", "paired", "sliding"],
)
@pytest.mark.parametrize("queries", [1, 2])
def test_shares_of_differences_equal_the_loops(changes: dict[str, Any], queries: int) -> None:
    model, tokenizer = gda_model(**changes), byte_tokenizer()
    report = report_of(model, queries=queries)
    model.set_attn_implementation("eager")
    expected: list[list[tuple[float, ...]]] = []
    for depth in DEPTHS:
        settings = NeedleSettings(LENGTH, depth, NEEDLES, queries, digits=7, samples=1, data_seed=0)
        [prompt] = make_prompts(settings, tokens_of(tokenizer))
        ids = tokenizer(prompt.text + prompt.target, return_tensors="pt").input_ids
        with torch.no_grad():
            maps = model(ids, output_attentions=True).attentions
        expected.append([counted(of_layer[0], prompt, tokenizer) for of_layer in maps])
    for layer, shares in enumerate(report.by_layer["difference"]):
        assert_shares(shares, [of_depth[layer] for of_depth in expected])
    for shares, of_depth in zip(report.by_depth["difference"], expected, strict=True):
        assert_shares(shares, of_depth)


def assert_shares(got: AttentionShares, expected: list[tuple[float, ...]]) -> None:
    means = [sum(column) / len(expected) for column in zip(*expected, strict=True)]
    assert [got.answer, got.noise_context, got.first_token, got.entropy] == pytest.approx(means, abs=1e-5)


def test_llama_as_its_own_baseline() -> None:
    llama = llama_model(max_position_embeddings=1024)
    report = report_of(llama, baseline=llama)
    assert list(report.by_layer) == list(report.by_depth) == ["signal", "baseline"]
    assert report.by_layer["signal"] == report.by_layer["baseline"]
    assert report.by_depth["signal"] == report.by_depth["baseline"]
    assert report.lambdas == [None, None]
    for shares in report.by_layer["signal"]:
        assert 0 < shares.answer < 1
        assert shares.answer + shares.noise_context + shares.first_token < 1


def test_an_expanded_llama_attends_like_its_source(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "llama", max_position_embeddings=1024)
    convert(folder, tmp_path / "gda")
    llama, expanded = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, tmp_path / "gda"))
    report = report_of(expanded, baseline=llama)
    assert report.lambdas == pytest.approx([0.0, 0.0], abs=1e-6)
    for kind in ("signal", "difference"):
        for got, expected in zip(report.by_layer[kind], report.by_layer["baseline"], strict=True):
            assert astuple(got) == pytest.approx(astuple(expected), abs=1e-5)


def test_lambda_of_each_layer() -> None:
    assert report_of(gda_model()).lambdas == pytest.approx([0.3, 0.4])
    token_dependent = report_of(gda_model(lambda_type="sigmoid")).lambdas
    assert all(value is not None and 0 < value < 1 for value in token_dependent)


def test_attention_that_is_not_finite_is_refused() -> None:
    broken = gda_model()
    with torch.no_grad():
        broken.model.layers[1].self_attn.q_proj.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="layer 1 has attention that is not finite"):
        report_of(broken)


def test_gda_baseline_with_more_layers() -> None:
    deeper = gda_model(num_hidden_layers=3)
    report = report_of(gda_model(), baseline=deeper)
    assert report.by_layer["baseline"] == report_of(deeper).by_layer["difference"]
    assert report.to_markdown().count("\n| 2 |  |  |  |  | 0.") == 1


def test_tokenizers_must_read_the_prompts_alike() -> None:
    ours, other = byte_tokenizer(), byte_tokenizer()
    assert read_texts(DEFAULTS, ours, other)
    other.add_tokens(["magic"])
    with pytest.raises(ValueError, match="model and baseline must share one tokenizer, but"):
        read_texts(DEFAULTS, ours, other)


def test_seed_determines_the_prompts() -> None:
    model = gda_model()
    assert report_of(model, data_seed=3) == report_of(model, data_seed=3)
    assert report_of(model, data_seed=3) != report_of(model, data_seed=4)


def test_report_as_json_markdown_and_tables() -> None:
    report = report_of(gda_model(), baseline=llama_model(max_position_embeddings=1024))
    fields = json.loads(json.dumps(report.to_dict()))
    assert fields["by_layer"]["noise"][1]["entropy"] == report.by_layer["noise"][1].entropy
    assert (fields["length"], fields["samples"], fields["depths"]) == (LENGTH, 1, [0.0, 0.25, 0.5, 0.75, 1.0])
    assert LENGTH - 120 < fields["tokens"] <= LENGTH
    lines = report.to_markdown().splitlines()
    of_difference = report.by_depth["difference"]
    assert "| maps | 0 % | 25 % | 50 % | 75 % | 100 % | mean |" in lines
    mean = [sum(getattr(shares, name) for shares in of_difference) / 5 for name in ("answer", "noise_context")]
    cells = [f"{shares.answer:.3f} / {shares.noise_context:.3f}" for shares in of_difference]
    assert f"| difference | {' | '.join(cells)} | {mean[0]:.3f} / {mean[1]:.3f} |" in lines
    assert "| layer | λ | signal | noise | difference | baseline |" in lines
    first = report.by_layer["signal"][0]
    shown = f"{first.answer:.3f} / {first.noise_context:.3f} / {first.first_token:.3f} / {first.entropy:.2f}"
    assert any(line.startswith(f"| 0 | 0.3000 | {shown} |") for line in lines)
    screen = Console(file=StringIO(), width=200)
    for table in report.tables():
        screen.print(table.for_screen())
    assert shown in screen.file.getvalue()  # type: ignore[attr-defined]


def test_defaults_equal_the_task() -> None:
    written = (TASKS_FOLDER / "needles.yaml").read_text()
    for name, value in asdict(DEFAULTS).items():
        assert f"\n  {name}: {value}\n" in written
    assert read_prompt_settings({}) == DEFAULTS


def test_every_setting_of_the_retrieval_task_applies() -> None:
    given = {"length": 300, "needles": 3, "queries": 2, "digits": 5}
    for metadata, depths, samples in (({"samples": 7}, list(DEPTHS), 2), ({"depth": 1, "samples": 3}, [1.0], 3)):
        settings = read_prompt_settings(given | {"data_seed": 9} | metadata)
        fields = diagnose(gda_model(), read_texts(settings, byte_tokenizer()), settings).to_dict()
        assert fields == fields | given | {"data_seed": 9, "depths": depths, "samples": samples}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"lenght": 300}, "did you mean `length`"),
        ({"seed": 3}, "has no setting `seed`; it has length, depth, .*data_seed"),
        ({"pairs": 3}, "has no setting `pairs`"),
        ({"samples": 0}, "`samples`"),
        ({"depth": 50}, "`depth`"),
    ],
)
def test_invalid_metadata_is_refused_before_anything_runs(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_with_baseline("no/such-model", diagnostics=True, metadata=metadata)


def test_metadata_of_another_task_is_ignored() -> None:
    assert read_prompt_settings({"pairs": 3}) == DEFAULTS


def test_invalid_settings_are_refused() -> None:
    for options, message in (
        ({"length": 50}, "`length` 50 is too short"),
        ({"depth": 1.5}, "`depth`"),
        ({"samples": 0}, "`samples`"),
        ({"length": 2000}, "reads 1024; choose a smaller length"),
    ):
        with pytest.raises(ValueError, match=message):
            report_of(gda_model(), **options)
    with pytest.raises(ValueError, match="must share one tokenizer"):
        report_of(gda_model(), baseline=gda_model(vocab_size=50))
