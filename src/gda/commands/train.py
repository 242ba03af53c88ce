"""`gda train`: train a GDA model on text."""

from typing import TYPE_CHECKING

import typer

from gda.commands.app import JSON, Group, command, print_json, progress_console
from gda.commands.written import print_pushed
from gda.common.errors import Interrupted
from gda.common.progress import is_main_process
from gda.training.settings import TrainOptions

if TYPE_CHECKING:
    from gda.training.report import TrainReport


@command(
    TrainOptions,
    Group.TRAIN,
    examples=(
        "gda train ./llama-gda ./trained --data text.txt --eval-data held_out.txt --steps 2000",
        "gda train ./llama-gda ./trained --data text.txt --steps 2000 --resume",
        "gda train ./bigger ./trained --data rows.jsonl --data more.parquet --train new",
        "gda train ./llama-split ./recovered --data text.txt --teacher ./llama --lambda-learning-rate 1e-3",
        "gda train me/llama-gda ./trained --data HuggingFaceFW/fineweb-edu:sample-10BT --streaming --steps 20000",
        "gda train ./trained --plot",
        "accelerate launch --num_processes 8 -m gda.cli train ./llama-gda ./trained --data text.txt",
    ),
)
def train(options: TrainOptions, as_json: JSON = False) -> None:
    """Train a GDA model on text: all parameters, the attention, new parameters only, or LoRA.

    Training uses the Trainer of transformers. Ctrl-C finishes the current step and writes a checkpoint; --resume
    continues from it and gives the weights of an uninterrupted run. Parts at fade 0, such as those of
    `gda grow --masked` or a new head norm, are faded in over the steps. OUT appears only when it is complete.
    """
    if options.only_plots:
        from gda.training.plot import plot

        page = plot(options.model)
        print_json({"page": str(page)}) if as_json else typer.echo(page)
        return
    from gda.training.runs.processes import disconnect
    from gda.training.train import train as function

    try:
        report = function.run(options, console=progress_console)
    except Interrupted:
        disconnect()
        raise
    if is_main_process():
        print_json(report.to_dict()) if as_json else print_report(report)
    disconnect()


def print_report(report: "TrainReport") -> None:
    """Print what was trained, as lines of text."""
    for note in report.notes:
        typer.echo(f"note: {note}")
    in_data = "" if report.data_tokens is None else f" ({report.data_tokens:,} in the data)"
    amount = f"{report.steps:,} steps, {report.tokens:,} tokens{in_data}"
    parameters = f"{report.num_trained:,} of {report.num_parameters:,} parameters"
    if report.dry_run:
        typer.echo(f"{amount}, {parameters}: would be trained; nothing was written (--dry-run)")
        return
    typer.echo(f"{amount}: first loss {_rounded(report.first_loss, 4)}, last loss {_rounded(report.last_loss, 4)}")
    if (report.first_eval_loss, report.last_eval_loss) != (None, None):
        loss = f"loss {_rounded(report.first_eval_loss, 4)} before, {_rounded(report.last_eval_loss, 4)} after"
        first, last = _rounded(report.first_perplexity, 2), _rounded(report.last_perplexity, 2)
        typer.echo(f"on --eval-data: {loss}; perplexity {first} before, {last} after")
    if report.tokens_per_second is not None:
        memory = f"at most {(report.peak_memory or 0) / 1e9:.2f} GB of memory"
        resumed = "" if report.resumed_from is None else f", resumed from step {report.resumed_from:,}"
        typer.echo(f"{report.tokens_per_second:,.0f} tokens per second{resumed}, {memory}")
    typer.echo(f"{report.out}: {parameters} trained")
    if report.pushed is not None:
        print_pushed(report.pushed)


def _rounded(value: float | None, digits: int) -> str:
    """A number of the report, which is None where the value is not finite."""
    return "not finite" if value is None else f"{value:.{digits}f}"
