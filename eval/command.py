"""The command `gda eval`: options in, screen and files out."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from gda.conversion.stream import shows_progress

from .card import update_card as write_card
from .evaluate import split_names
from .harness import ShownPrompt
from .models import silence_lm_eval
from .report import tables, to_json, write_report
from .run import EvalReport, Setting, run

WIDTH_OF_FILES = 160  # where nobody's screen breaks a line


def evaluate_command(
    model: str,
    baseline: str | None,
    *,
    tasks: str,
    metadata: str | None,
    output: str | None,
    html: bool,
    update_card: bool,
    as_json: bool,
    console: Console,
    **settings: Any,
) -> None:
    """Run `gda eval`; the options are explained by `gda eval --help`.

    Raises:
        FileNotFoundError, ValueError: for bad input, in one line that names the remedy.
    """
    if html and output is None:
        raise ValueError("--html writes report.html into the folder of --output; name one")
    if output is not None and Path(output).exists() and not Path(output).is_dir():
        raise ValueError(f"--output {output} is not a folder")
    if update_card and not Path(model).is_dir():
        raise ValueError(f"--update-card: {model} is not a local folder")
    if update_card and not tasks:
        raise ValueError("--update-card: there will be no scores to write; name --tasks")
    setting = Setting(tasks=split_names(tasks) if tasks else [], metadata=_parsed(metadata), **settings)
    silence_lm_eval(shows_progress(console))
    with contextlib.redirect_stdout(sys.stderr):  # where lm-eval says what batch size it found
        report = run(model, baseline, setting=setting, console=console)
    if report is None:
        return
    if output is not None:
        for path in write_report(report, Path(output), with_html=html):
            console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)
    if as_json:
        typer.echo(to_json(report))
    else:
        _print_report(report)
    if update_card:
        path = write_card(Path(model), report)
        console.print(f"wrote the scores into {path}", highlight=False, markup=False, soft_wrap=True)


def _print_report(report: EvalReport) -> None:
    screen = Console()
    if not screen.is_terminal:
        screen.width = WIDTH_OF_FILES
    for prompt in report.model.prompts:
        _print_prompt(screen, prompt)
    for table in tables(report):
        screen.print(table)


def _parsed(metadata: str | None) -> dict[str, Any] | None:
    if metadata is None:
        return None
    try:
        parsed = json.loads(metadata)
    except json.JSONDecodeError as error:
        raise ValueError(f"--metadata {metadata} is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f'--metadata {metadata} is not a JSON object such as {{"length": 4096}}')
    return parsed


def _print_prompt(screen: Console, prompt: ShownPrompt) -> None:
    """Text as Python would write it, so that line ends and blanks can be seen, and the ids below it."""
    screen.print(Text(prompt.task, "bold"))
    for name, text, ids in (
        ("prompt", prompt.prompt, prompt.prompt_ids),
        ("scored", prompt.continuation, prompt.continuation_ids),
    ):
        if text is not None:
            screen.print(Text(f"  {name}  {text!r}"), soft_wrap=True)
            screen.print(Text(f"          {ids}"), soft_wrap=True)
