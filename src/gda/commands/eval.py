"""The command `gda eval`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.text import Text

from gda.commands.app import JSON, Group, command, progress_console
from gda.common.files import refuse_existing
from gda.common.options import option
from gda.common.places import check_writable
from gda.eval.options import OUTPUT, EvaluateOptions, files_of_results

if TYPE_CHECKING:
    from gda.eval.lm_eval.harness import ReceivedRequest
    from gda.eval.report import EvalReport

WIDTH_OF_FILES = 160  # of tables that are not printed on a screen


@dataclass(frozen=True)
class EvalOutputOptions(EvaluateOptions):
    """Options of `gda eval`: those of the evaluation, and the files that are written."""

    output: str | None = option(
        None, "Folder to write results.json and results.md to. Default: none.", panel=OUTPUT, metavar="DIR"
    )
    html: bool = option(False, "Also write report.html to the --output folder.", panel=OUTPUT)
    log_samples: bool = option(
        False,
        "Also write each document with the model's answers to samples_TASK.jsonl in the --output folder.",
        panel=OUTPUT,
    )
    overwrite: bool = option(
        False,
        "Replace results.*, report.html and samples in the --output folder, and remove those not written again.",
        panel=OUTPUT,
    )
    update_card: bool = option(False, "Write the scores to the model card (README.md) in MODEL.", panel=OUTPUT)


@command(
    EvalOutputOptions,
    Group.EVALUATE,
    name="eval",
    examples=(
        "gda eval ./llama-gda --baseline ./llama --tasks hellaswag,arc_easy --batch-size 16",
        "gda eval ./llama-gda --tasks gda_tasks --limit 48 --output results --html",
        "gda eval ./llama-gda --tasks gsm8k --dataset-root ./data --apply-chat-template",
        "gda eval ./llama-gda --perplexity text.txt --json",
    ),
)
def evaluate(options: EvalOutputOptions, as_json: JSON = False) -> None:
    """Run tasks of lm-evaluation-harness on a model and, with the same options, on a baseline.

    Tasks come from lm-eval, which reads data from the Hub or local files, or from this package, whose tasks generate
    their data. The group gda_tasks contains gda_retrieval, gda_mqar_by_pairs, gda_copy_by_length and
    gda_fewshot_by_arrangement.
    """
    _check_outputs(options)
    from gda.eval.evaluate import evaluate_with_baseline

    def publish(report: "EvalReport", update_card: bool = False) -> None:
        _publish(report, options, as_json, update_card)

    report = evaluate_with_baseline.run(options, console=progress_console, keep=publish)
    if report is not None:  # in the first of several processes
        publish(report, options.update_card)


def _publish(report: "EvalReport", options: EvalOutputOptions, as_json: bool, update_card: bool) -> None:
    """Write the report to the --output folder, and the scores to the card; then print, as the output may be closed."""
    from gda.eval.card import update_card as write_scores
    from gda.eval.report import write_report

    written: list[Path] = []
    try:
        if options.output is not None:
            written += write_report(
                report,
                Path(options.output),
                with_html=options.html,
                with_samples=options.log_samples,
                overwrite=options.overwrite,
            )
    finally:
        try:
            if update_card:
                written.append(write_scores(Path(options.model), report))
        finally:
            _print(report, as_json, written)


def _print(report: "EvalReport", as_json: bool, written: list[Path]) -> None:
    from gda.eval.report import to_json

    if as_json:
        typer.echo(to_json(report))
    else:
        _print_report(report)
    for name, note in report.notes():
        progress_console.print(f"note on {name}: {note}", highlight=False, markup=False, soft_wrap=True)
    for path in written:
        progress_console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)


def _check_outputs(options: EvalOutputOptions) -> None:
    """Check that everything can be written before anything is run."""
    output = options.output
    if options.html and output is None:
        raise ValueError("--html writes report.html to the folder of --output; name one")
    if options.log_samples and (output is None or not options.tasks):
        raise ValueError("--log-samples writes the documents of --tasks to the folder of --output; name both")
    if output is not None:
        if not output or (Path(output).exists() and not Path(output).is_dir()):
            raise ValueError(f"--output {output or repr(output)} is not a folder")
        for file in files_of_results(Path(output)):
            refuse_existing(file, options.overwrite)
        check_writable(Path(output), "--output")
    if options.update_card:
        if not options.tasks:
            raise ValueError("--update-card needs scores to write; name --tasks")
        if not Path(options.model).is_dir():
            raise ValueError(f"--update-card: {options.model} is not a local folder")
        check_writable(Path(options.model), "--update-card")
        from gda.eval.card import read_card

        read_card(Path(options.model))


def _print_report(report: "EvalReport") -> None:
    from gda.eval.report import tables

    screen = Console()
    if not screen.is_terminal:
        screen.width = WIDTH_OF_FILES
    for prompt in report.model.prompts:
        _print_prompt(screen, prompt)
    for table in tables(report):
        screen.print(table.for_screen())


def _print_prompt(screen: Console, prompt: "ReceivedRequest") -> None:
    """Print texts as Python literals, which makes line ends and spaces visible, and their token ids."""
    cut = f"  (the first {prompt.cut} tokens were cut)" if prompt.cut else ""
    screen.print(Text.assemble((prompt.task, "bold"), cut), soft_wrap=True)
    for name, text, ids in (
        ("prompt", prompt.prompt, prompt.prompt_ids),
        ("scored", prompt.continuation, prompt.continuation_ids),
    ):
        if text is not None:
            screen.print(Text(f"  {name}  {text!r}"), soft_wrap=True)
            screen.print(Text(f"          {ids}"), soft_wrap=True)
