"""The report of `gda eval`, and its forms: tables on the screen, JSON, Markdown and HTML."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gda.common.files import write_text
from gda.common.html import page
from gda.common.numbers import finite
from gda.common.perplexity import TextPerplexity, ratio_interval
from gda.common.versions import versions
from gda.eval.attention.diagnostics import DiagnosticsReport
from gda.eval.compare import Row
from gda.eval.options import HTML_FILE, MARKDOWN_FILE, RESULTS_FILE, SAMPLES, EvaluateOptions, files_of_results
from gda.eval.tables import TextTable, escaped

if TYPE_CHECKING:  # only tasks need lm-eval
    from gda.eval.lm_eval.harness import ReceivedRequest

OF_PROMPTS = ("num_fewshot", "apply_chat_template", "system_instruction")  # options that need a prompt
PACKAGES = ("torch", "transformers", "lm_eval", "datasets")
WITHIN = {True: "yes", False: "NO", None: ""}


def scores_bare_text(config: dict[str, Any]) -> bool:
    """Whether a task, by its configuration, scores a text without a prompt."""
    return config.get("output_type") == "loglikelihood_rolling"


@dataclass(frozen=True)
class ModelResult:
    """Results of one model: lm-eval's dictionary ({"results": {}} without tasks), and what else was measured."""

    name: str
    revision: str | None
    results: dict[str, Any]
    perplexity: TextPerplexity | None
    prompts: "list[ReceivedRequest]"
    sha256: dict[str, str]
    seconds: float
    dtype: str
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Everything but lm-eval's results, as JSON-ready values."""
        return {
            "model": self.name,
            "revision": self.revision,
            "sha256": self.sha256,
            "seconds": self.seconds,
            "dtype": self.dtype,
            "notes": self.notes,
            "prompts": [asdict(prompt) for prompt in self.prompts],
            "perplexity": None if self.perplexity is None else _without("losses", asdict(self.perplexity)),
        }


@dataclass(frozen=True)
class EvalReport:
    """The report of `gda eval`: the scores of the model and of its baseline side by side."""

    model: ModelResult
    baseline: ModelResult | None
    rows: list[Row]
    options: EvaluateOptions
    diagnostics: DiagnosticsReport | None = None

    @property
    def models(self) -> list[ModelResult]:
        """The results of the model and, if there is one, of the baseline."""
        return [self.model] if self.baseline is None else [self.model, self.baseline]

    @property
    def perplexities(self) -> list[TextPerplexity]:
        """The perplexities of the models, in their order; empty if none was measured."""
        return [model.perplexity for model in self.models if model.perplexity is not None]

    @property
    def same_number_of_tokens(self) -> bool:
        """Whether all models read the text as the same number of tokens, so that their ratio is one per token."""
        return len({each.tokens for each in self.perplexities}) == 1

    @property
    def perplexity_ratio(self) -> float | None:
        """The model's perplexity divided by its baseline's: per token if both read the same number, else per word."""
        if len(self.perplexities) < 2:
            return None
        ours, theirs = self.perplexities
        return ours.token / theirs.token if self.same_number_of_tokens else ours.word / theirs.word

    @property
    def perplexity_ratio_interval(self) -> tuple[float, float] | None:
        """95 % confidence interval of the ratio; None without one, or where the models read different sequences."""
        if len(self.perplexities) < 2:
            return None
        ours, theirs = self.perplexities
        return ratio_interval(ours.losses, theirs.losses)

    def settings(self) -> dict[str, Any]:
        """The options of the evaluation, without the two models and the files that are written."""
        names = [each.name for each in fields(EvaluateOptions) if each.name not in ("model", "baseline")]
        return {name: getattr(self.options, name) for name in names}

    def notes(self) -> list[tuple[str, str]]:
        """Pairs of a model's name and a note on it."""
        return [(model.name, note) for model in self.models for note in model.notes]

    def to_dict(self) -> dict[str, Any]:
        """lm-eval's results of the model without its samples and, under "gda", all the rest."""
        baseline = None
        if self.baseline is not None:
            baseline = {**_without("samples", self.baseline.results), "gda": self.baseline.to_dict()}
        return {
            **_without("samples", self.model.results),
            "gda": {
                **self.model.to_dict(),
                "settings": self.settings(),
                "versions": versions(*PACKAGES),
                "comparison": [asdict(row) for row in self.rows],
                "perplexity_ratio": self.perplexity_ratio,
                "perplexity_ratio_interval": self.perplexity_ratio_interval,
                "diagnostics": None if self.diagnostics is None else self.diagnostics.to_dict(),
                "baseline": baseline,
            },
        }


def _without(unwanted: str, values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != unwanted}


def to_json(report: EvalReport) -> str:
    """The report as JSON: lm-eval's own format with one more key, "gda"."""
    return json.dumps(finite(report.to_dict()), indent=2, ensure_ascii=False, allow_nan=False, default=_serializable)


def _serializable(value: Any) -> Any:
    """The name of a tokenizer; other values as lm-eval writes them."""
    if isinstance(value, set):
        return list(value)
    return getattr(value, "name_or_path", None) or (int(value) if isinstance(value, np.integer) else str(value))


def write_report(
    report: EvalReport,
    folder: Path,
    *,
    with_html: bool = False,
    with_samples: bool = False,
    overwrite: bool = False,
) -> list[Path]:
    """Write results.json and results.md into `folder`, and if asked for, report.html and the samples of each task.

    Each file appears whole. With `overwrite`, those of an earlier run that are not asked for are removed.
    samples_TASK.jsonl has a line for each document, as lm-eval writes it; the baseline's are in
    baseline_samples_TASK.jsonl.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {RESULTS_FILE: to_json(report) + "\n", MARKDOWN_FILE: to_markdown(report)}
    if with_html:
        texts[HTML_FILE] = to_html(report)
    if with_samples:
        for prefix, model in zip(SAMPLES, report.models, strict=False):
            for task, samples in model.results.get("samples", {}).items():
                texts[f"{prefix}{task}.jsonl"] = "".join(map(_sample_line, samples))
    for name, text in texts.items():
        write_text(folder / name, text)
    for path in files_of_results(folder) if overwrite else ():
        if path.name not in texts:
            path.unlink()
    return [folder / name for name in texts]


def _sample_line(sample: dict[str, Any]) -> str:
    """A sample as a line of JSON, with requests and target in the form in which lm-eval saves them."""
    from lm_eval.utils import sanitize_list

    requests = {
        f"gen_args_{index}": {f"arg_{place}": argument for place, argument in enumerate(arguments)}
        for index, arguments in enumerate(sample["arguments"])
    }
    saved = sample | {"arguments": requests, "target": str(sample["target"])}
    saved |= {name: sanitize_list(sample[name]) for name in ("resps", "filtered_resps")}
    return json.dumps(saved, default=_serializable, ensure_ascii=False) + "\n"


def tables(report: EvalReport) -> list[TextTable]:
    """All tables of the report: scores, perplexities and diagnostics, as far as there are any."""
    tables = [table for table in (_score_table(report), _perplexity_table(report)) if table.rows]
    return tables if report.diagnostics is None else [*tables, *report.diagnostics.tables()]


def to_markdown(report: EvalReport) -> str:
    """The tables in Markdown, followed by the settings."""
    facts = "\n".join(f"- {escaped(name)}: {escaped(value)}" for name, value in _facts(report))
    return "\n\n".join([*(table.to_markdown() for table in tables(report)), facts]) + "\n"


def to_html(report: EvalReport) -> str:
    """A self-contained page with bars, tables and settings. Every name is escaped."""
    bars = [row for row in report.rows if 0 <= row.score <= 1 and (row.baseline is None or 0 <= row.baseline <= 1)]
    return page(
        Path(__file__).parent / "templates" / "report.html.jinja",
        names=[model.name for model in report.models],
        bars=bars,
        tables=tables(report),
        prompts=report.model.prompts,
        facts=_facts(report),
    )


def _score_table(report: EvalReport) -> TextTable:
    headings = ["task", "metric", *(model.name for model in report.models)]
    rows = [[row.task, row.label, _score(row.score, row.stderr)] for row in report.rows]
    if report.baseline is not None:
        headings += ["difference", "≤ 2 stderr"]
        for row, cells in zip(report.rows, rows, strict=True):
            difference = "" if row.difference is None else f"{row.difference:+.4f}"
            cells += [_score(row.baseline, row.baseline_stderr), difference, WITHIN[row.within]]
    return TextTable(headings, rows)


def _score(score: float | None, stderr: float | None) -> str:
    if score is None:
        return ""
    return f"{score:.4f}" if stderr is None else f"{score:.4f} ± {stderr:.4f}"


def _perplexity_table(report: EvalReport) -> TextTable:
    rows = []
    for model in report.models:
        if (measured := model.perplexity) is not None:
            values = [measured.token, measured.word, measured.byte]
            numbers = [measured.tokens, measured.context, measured.stride]
            shown = [f"{value:.4f}" if value < 1e6 else f"{value:.4e}" for value in values]
            rows.append([model.name, *shown, *(f"{number:,}" for number in numbers)])
    headings = ["perplexity", "token", "word", "byte", "tokens", "context", "stride"]
    if (ratio := report.perplexity_ratio) is not None:
        headings.append("ratio" if report.same_number_of_tokens else "ratio per word")
        rows[0].append(f"{ratio:.4f}")
        rows[1].append(f"{1:.4f}")
        if (interval := report.perplexity_ratio_interval) is not None:
            headings.append("95 % interval")
            rows[0].append("{:.4f} to {:.4f}".format(*interval))
            rows[1].append("")
    return TextTable(headings, rows)


def _facts(report: EvalReport) -> list[tuple[str, str]]:
    """How the numbers were obtained: settings, versions, weights and notes."""
    defaults = {each.name: each.default for each in fields(report.options)}
    settings = {name: value for name, value in report.settings().items() if value not in (defaults.get(name), None, ())}
    words = {name: value if isinstance(value, list | tuple) else [value] for name, value in settings.items()}
    facts = [("settings", ", ".join(" ".join(map(str, [name, *values])) for name, values in words.items()))]
    facts.append(("versions", ", ".join(f"{name} {value}" for name, value in versions(*PACKAGES).items())))
    for model in report.models:
        hashes = ", ".join(f"{file} {digest[:16]}…" for file, digest in model.sha256.items())
        facts.append((model.name, f"{model.dtype}; {model.seconds:.0f} s; SHA-256 {hashes}"))
    return [*facts, *((f"note on {name}", note) for name, note in report.notes())]
