"""What `gda eval` found, for people: a table on the screen, Markdown, HTML."""

import html
import json
from pathlib import Path
from typing import Any

from lm_eval.utils import handle_non_serializable
from rich.table import Table
from rich.text import Text

from gda.common.files import write_text
from gda.common.html import page
from gda.eval.compare import Row
from gda.eval.run import EvalReport, Outcome

WITHIN = {True: "yes", False: "NO", None: ""}
RESULTS_FILE, MARKDOWN_FILE, HTML_FILE = "results.json", "results.md", "report.html"


def to_json(report: EvalReport) -> str:
    """The report as JSON: lm-eval's own format, and one more key, "gda"."""
    text = json.dumps(report.to_dict(), ensure_ascii=False, default=_plain)
    finite = json.loads(text, parse_constant=lambda _: None)  # JSON knows neither NaN nor infinity
    return json.dumps(finite, indent=2, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    """A tokenizer among the settings is told by its name."""
    return getattr(value, "name_or_path", None) or handle_non_serializable(value)


def write_report(report: EvalReport, folder: Path, *, with_html: bool = False) -> list[Path]:
    """Write results.json, results.md and, if asked for, report.html into `folder`; each appears whole.

    The report.html of other results does not stay beside them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {RESULTS_FILE: to_json(report) + "\n", MARKDOWN_FILE: to_markdown(report)}
    if with_html:
        texts[HTML_FILE] = to_html(report)
    for name, text in texts.items():
        write_text(folder / name, text)
    if not with_html:
        (folder / HTML_FILE).unlink(missing_ok=True)
    return [folder / name for name in texts]


def columns(report: EvalReport) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the table of scores."""
    headings = ["task", "metric", *(outcome.name for outcome in _outcomes(report))]
    cells = [[row.task, row.label, _score(row.score, row.stderr)] for row in report.rows]
    if report.baseline is not None:
        headings += ["difference", "≤ 2 stderr"]
        for row, line in zip(report.rows, cells, strict=True):
            line += [_score(row.baseline, row.baseline_stderr), _difference(row), WITHIN[row.within]]
    return headings, cells


def _score(score: float | None, stderr: float | None) -> str:
    if score is None:
        return ""
    return f"{score:.4f}" if stderr is None else f"{score:.4f} ± {stderr:.4f}"


def _difference(row: Row) -> str:
    return "" if row.difference is None else f"{row.difference:+.4f}"


def perplexity_columns(report: EvalReport) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the table of perplexities; no cells if there are none."""
    headings = ["perplexity", "token", "word", "byte", "tokens", "context", "stride"]
    cells = []
    for outcome in _outcomes(report):
        if (measured := outcome.perplexity) is not None:
            values = [_perplexity(value) for value in (measured.token, measured.word, measured.byte)]
            counts = [f"{measured.tokens:,}", f"{measured.context:,}", f"{measured.stride:,}"]
            cells.append([outcome.name, *values, *counts])
    return headings, cells


def _perplexity(value: float) -> str:
    return f"{value:.4f}" if value < 1e6 else f"{value:.4e}"


def _outcomes(report: EvalReport) -> list[Outcome]:
    return [outcome for outcome in (report.model, report.baseline) if outcome is not None]


def tables(report: EvalReport) -> list[Table]:
    """The tables for the screen."""
    made = []
    for headings, cells in (columns(report), perplexity_columns(report)):
        if cells:
            table = Table()
            for index, heading in enumerate(headings):
                is_name = index == 0 or heading == "metric"
                table.add_column(
                    Text(heading), justify="left" if is_name else "right", overflow="fold", no_wrap=not is_name
                )
            for row in cells:
                table.add_row(*map(Text, row))  # names are no markup
            made.append(table)
    return made if report.diagnostics is None else [*made, *report.diagnostics.tables()]


def to_markdown(report: EvalReport) -> str:
    """The tables in Markdown, with the settings below them."""
    parts = [_markdown_table(*table) for table in (columns(report), perplexity_columns(report)) if table[1]]
    if report.diagnostics is not None:
        parts.append(report.diagnostics.to_markdown())
    parts.append("\n".join(f"- {_escaped(name)}: {_escaped(value)}" for name, value in facts(report)))
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _markdown_table(headings: list[str], cells: list[list[str]]) -> str:
    rules = ["---" if index < 2 else "---:" for index, _ in enumerate(headings)]
    return "\n".join(f"| {' | '.join(map(_escaped, row))} |" for row in (headings, rules, *cells))


def _escaped(text: str) -> str:
    """Text that stays in its cell, and is no markup."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")


def facts(report: EvalReport) -> list[tuple[str, str]]:
    """How the numbers came to be."""
    found = report.to_dict()["gda"]
    settings = {name: value for name, value in found["settings"].items() if value not in (None, False, 0, ())}
    told = [("settings", ", ".join(f"{name} {_told(value)}" for name, value in settings.items()))]
    told.append(("versions", ", ".join(f"{name} {value}" for name, value in found["versions"].items())))
    for outcome in _outcomes(report):
        hashes = ", ".join(f"{file} {digest[:16]}…" for file, digest in outcome.sha256.items())
        told.append((outcome.name, f"{outcome.dtype}; {outcome.seconds:.0f} s; SHA-256 {hashes}"))
    return [*told, *((f"note on {name}", note) for name, note in report.notes())]


def _told(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def to_html(report: EvalReport) -> str:
    """A page that needs nothing else: bars, tables and settings. Every name is escaped."""
    shares = [row for row in report.rows if 0 <= row.score <= 1 and (row.baseline is None or 0 <= row.baseline <= 1)]
    return page(
        Path(__file__).parent / "templates" / "report.html.jinja",
        names=[outcome.name for outcome in _outcomes(report)],
        bars=shares,
        tables=[table for table in (columns(report), perplexity_columns(report)) if table[1]],
        diagnostics=None if report.diagnostics is None else report.diagnostics.to_markdown(),
        prompts=report.model.prompts,
        facts=facts(report),
    )
