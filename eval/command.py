"""The command `gda eval`: options in, screen and files out."""

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from gda.common.screen import shows_progress
from gda.eval.card import read_card
from gda.eval.card import update_card as write_card
from gda.eval.evaluate import split_names
from gda.eval.lm_eval.harness import ShownPrompt
from gda.eval.models import quiet_lm_eval
from gda.eval.report import tables, to_json, write_report
from gda.eval.run import EvalReport, Setting, run

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
    _check_places(Path(model), output, html=html, update_card=update_card)
    if update_card and not tasks:
        raise ValueError("--update-card: there will be no scores to write; name --tasks")
    setting = Setting(tasks=split_names(tasks) if tasks else [], metadata=_parsed(metadata), **settings)
    # lm-eval prints what batch size it found.
    with quiet_lm_eval(progress=shows_progress(console)), contextlib.redirect_stdout(sys.stderr):
        report = run(model, baseline, setting=setting, console=console)
    if report is None:
        return
    if as_json:
        typer.echo(to_json(report))
    else:
        _print_report(report)
    for name, note in report.notes():
        console.print(f"note on {name}: {note}", highlight=False, markup=False, soft_wrap=True)
    if output is not None:
        for path in write_report(report, Path(output), with_html=html):
            console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)
    if update_card:
        path = write_card(Path(model), report)
        console.print(f"wrote the scores into {path}", highlight=False, markup=False, soft_wrap=True)


def _check_places(model: Path, output: str | None, *, html: bool, update_card: bool) -> None:
    """Refuse what cannot be written, before anything is run for it.

    Raises:
        ValueError: naming the option.
    """
    if html and output is None:
        raise ValueError("--html writes report.html into the folder of --output; name one")
    if output is not None:
        if not output or (Path(output).exists() and not Path(output).is_dir()):
            raise ValueError(f"--output {output or repr(output)} is not a folder")
        _check_writable(Path(output), "--output")
    if update_card:
        if not model.is_dir():
            raise ValueError(f"--update-card: {model} is not a local folder")
        _check_writable(model, "--update-card")
        read_card(model)


def _check_writable(folder: Path, option: str) -> None:
    """Try a file in `folder`, or in the nearest above it that is there."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"{option}: nothing can be written into {there}: {error.strerror}") from None


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
    cut = f"  (the model did not get the first {prompt.cut} tokens)" if prompt.cut else ""
    screen.print(Text.assemble((prompt.task, "bold"), cut), soft_wrap=True)
    for name, text, ids in (
        ("prompt", prompt.prompt, prompt.prompt_ids),
        ("scored", prompt.continuation, prompt.continuation_ids),
    ):
        if text is not None:
            screen.print(Text(f"  {name}  {text!r}"), soft_wrap=True)
            screen.print(Text(f"          {ids}"), soft_wrap=True)
