"""The command `gda`. Nothing heavy is imported before a command runs."""

import sys
from typing import Annotated, Any, NoReturn

import typer

from gda.commands import (  # noqa: F401 - registers the commands, in the order of `gda --help`  # isort: skip
    convert,
    grow,
    fold,
    export,
    verify,
    inspect,
    eval,
    attention,
    demo,
    push,
    serve,
)
from gda.commands.app import app, is_main_process, print_json, progress_console
from gda.common.errors import CheckFailed

INTERRUPTED = 130

Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit, for a Hub id.")]
BundleCode = Annotated[
    bool, typer.Option(help="Put the model's code beside it: it then loads with trust_remote_code where gda is absent.")
]
Private = Annotated[bool | None, typer.Option("--private/--public", help="What the repository must be.")]

DATA_PANEL, LEARN_PANEL, PACE_PANEL = "Data", "What learns", "Steps and rates"
GDA_PANEL, TEACHER_PANEL, WATCH_PANEL = "λ", "A teacher", "Log, measurements and checkpoints"


@app.command(
    epilog="Examples:  gda train ./llama-gda ./trained --data text.txt --eval-data held_out.txt --steps 2000"
    "  ·  gda train ./bigger ./trained --data rows.jsonl --data more.parquet --train new"
    "  ·  gda train ./llama-split ./recovered --data text.txt --teacher ./llama --lambda-learning-rate 1e-3"
    "  ·  gda train me/llama-gda ./trained --data HuggingFaceFW/fineweb-edu:sample-10BT --streaming --steps 20000 "
    "--schedule wsd --report-to tensorboard"
    "  ·  gda train ./llama-gda ./trained --data text.txt --steps 2000 --resume"
    "  ·  accelerate launch --num_processes 8 -m gda.cli train ./llama-gda ./trained --data text.txt"
    "  ·  gda train ./trained --plot"
)
def train(
    model: Annotated[
        str,
        typer.Argument(help="A GDA model with its tokenizer: a folder, a checkpoint of an earlier run or a Hub id."),
    ],
    out: Annotated[
        str | None, typer.Argument(help="The folder to make; left out with --plot, which draws MODEL's log again.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE|DATASET",
            help="Text, .jsonl, .parquet, a folder of them, or NAME[:CONFIG[:SPLIT]] of the Hub; may be repeated.",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None,
    eval_data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE|DATASET",
            help="The same, to measure the loss on before, while and after.",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None,
    text_field: Annotated[
        str, typer.Option(help="The field of a row that holds its text.", rich_help_panel=DATA_PANEL)
    ] = "text",
    streaming: Annotated[
        bool,
        typer.Option("--streaming", help="Read the data while training; needs --steps.", rich_help_panel=DATA_PANEL),
    ] = False,
    context: Annotated[
        int | None,
        typer.Option(
            help="Tokens a window; by default 512, or what the model was made for if less.", rich_help_panel=DATA_PANEL
        ),
    ] = None,
    train: Annotated[
        str,
        typer.Option(
            help="new: what trainable.json of MODEL calls new, the rest stays bit for bit; attention: those layers; "
            "all; lora: low-rank updates of the attention, λ and head norms whole.",
            rich_help_panel=LEARN_PANEL,
        ),
    ] = "all",
    lora_rank: Annotated[int, typer.Option(help="For --train lora.", rich_help_panel=LEARN_PANEL)] = 16,
    precision: Annotated[
        str,
        typer.Option(
            help="What matrices are multiplied in: float32, bfloat16, or auto: bfloat16 for a model that is, on a GPU "
            "that has it. Weights are float32 while they learn.",
            rich_help_panel=LEARN_PANEL,
        ),
    ] = "auto",
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="Compute activations twice: slower, in less memory.",
            rich_help_panel=LEARN_PANEL,
        ),
    ] = False,
    steps: Annotated[
        int | None,
        typer.Option(help="Optimizer steps; by default --epochs times through the data.", rich_help_panel=PACE_PANEL),
    ] = None,
    epochs: Annotated[
        float, typer.Option(help="How often the data is read, without --steps.", rich_help_panel=PACE_PANEL)
    ] = 1.0,
    batch_size: Annotated[
        int, typer.Option(help="Windows in a forward pass of one process.", rich_help_panel=PACE_PANEL)
    ] = 8,
    accumulation: Annotated[int, typer.Option(help="Forward passes in a step.", rich_help_panel=PACE_PANEL)] = 1,
    learning_rate: Annotated[float, typer.Option(help="The largest.", rich_help_panel=PACE_PANEL)] = 1e-4,
    weight_decay: Annotated[
        float, typer.Option(help="AdamW's; λ, norms and biases have none.", rich_help_panel=PACE_PANEL)
    ] = 0.0,
    schedule: Annotated[
        str,
        typer.Option(
            help="linear or cosine: fall to 0; wsd: stay, and fall at the end; constant.", rich_help_panel=PACE_PANEL
        ),
    ] = "cosine",
    warmup: Annotated[
        float, typer.Option(help="Share of the steps in which rates rise.", rich_help_panel=PACE_PANEL)
    ] = 0.02,
    decay: Annotated[
        float, typer.Option(help="For wsd: share of the steps in which they fall.", rich_help_panel=PACE_PANEL)
    ] = 0.2,
    seed: Annotated[
        int, typer.Option(help="Of the order of windows, of dropout and LoRA.", rich_help_panel=PACE_PANEL)
    ] = 0,
    lambda_learning_rate: Annotated[
        float | None,
        typer.Option(help="Of what λ is made of; by default --learning-rate.", rich_help_panel=GDA_PANEL),
    ] = None,
    lambda_target: Annotated[
        float | None,
        typer.Option(help="Anneal λ from 0 over this value to what is learned.", rich_help_panel=GDA_PANEL),
    ] = None,
    lambda_anneal_steps: Annotated[
        int | None, typer.Option(help="The steps that takes.", rich_help_panel=GDA_PANEL)
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="A model to learn the predictions of: a folder, a Hub id or a .gguf file.",
            rich_help_panel=TEACHER_PANEL,
        ),
    ] = None,
    distill_weight: Annotated[
        float,
        typer.Option(
            help="Share of its predictions in the loss; the rest is the text's.", rich_help_panel=TEACHER_PANEL
        ),
    ] = 0.5,
    temperature: Annotated[
        float, typer.Option(help="By which both predictions are softened.", rich_help_panel=TEACHER_PANEL)
    ] = 1.0,
    hidden_weight: Annotated[
        float, typer.Option(help="Weight of the hidden states' distance.", rich_help_panel=TEACHER_PANEL)
    ] = 0.0,
    log_every: Annotated[
        int | None, typer.Option(help="Steps; by default a twentieth of all.", rich_help_panel=WATCH_PANEL)
    ] = None,
    eval_every: Annotated[
        int | None, typer.Option(help="Steps; by default a tenth of all.", rich_help_panel=WATCH_PANEL)
    ] = None,
    save_every: Annotated[
        int | None, typer.Option(help="Steps; by default a tenth of all.", rich_help_panel=WATCH_PANEL)
    ] = None,
    keep: Annotated[
        int, typer.Option(help="Checkpoints to keep while training goes on.", rich_help_panel=WATCH_PANEL)
    ] = 1,
    report_to: Annotated[
        list[str] | None,
        typer.Option(
            help="Log there too: tensorboard, trackio or wandb; may be repeated.", rich_help_panel=WATCH_PANEL
        ),
    ] = None,
    plot: Annotated[
        bool, typer.Option("--plot", help="Draw OUT/training.html of the log.", rich_help_panel=WATCH_PANEL)
    ] = False,
    revision: Revision = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint of a run that did not end.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it exists, and a run that did not end.")
    ] = False,
    bundle_code: BundleCode = True,
    push_to_hub: Annotated[str | None, typer.Option(metavar="REPO", help="Push OUT there when it is made.")] = None,
    private: Private = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, count tokens and steps, write nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a GDA model to predict a text: all of it, or only what `gda grow` has added.

    The Trainer of transformers does it. Ctrl-C finishes the step and writes a checkpoint; --resume goes on and ends in
    the same weights. Of a model in masked growth the mask rises to 1 over the steps. OUT appears only when it is whole.
    """
    if out is None:
        _draw_again(model, plot, data, as_json)
        return
    from gda.training.train import train as run

    report = run(
        model,
        out,
        data=data or (),
        eval_data=eval_data or (),
        text_field=text_field,
        streaming=streaming,
        context=context,
        train=train,
        lora_rank=lora_rank,
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        accumulation=accumulation,
        learning_rate=learning_rate,
        lambda_learning_rate=lambda_learning_rate,
        weight_decay=weight_decay,
        schedule=schedule,
        warmup=warmup,
        decay=decay,
        precision=precision,
        gradient_checkpointing=gradient_checkpointing,
        lambda_target=lambda_target,
        lambda_anneal_steps=lambda_anneal_steps,
        teacher=teacher,
        distill_weight=distill_weight,
        temperature=temperature,
        hidden_weight=hidden_weight,
        log_every=log_every,
        eval_every=eval_every,
        save_every=save_every,
        keep=keep,
        report_to=report_to or (),
        seed=seed,
        revision=revision,
        resume=resume,
        overwrite=overwrite,
        bundle_code=bundle_code,
        plot=plot,
        push_to_hub=push_to_hub,
        private=private,
        dry_run=dry_run,
        console=progress_console,
    )
    if is_main_process():
        print_json(report.to_dict()) if as_json else _print_trained(report)


def _draw_again(folder: str, plot: bool, data: list[str] | None, as_json: bool) -> None:
    if not plot or data:
        raise ValueError("OUT is missing; name the folder to make")
    from gda.training.plot import plot as draw

    page = draw(folder)
    print_json({"page": str(page)}) if as_json else typer.echo(page)


def _figure(value: float | None, digits: int) -> str:
    """A number of a report, which holds None for what is not finite."""
    return "not finite" if value is None else f"{value:.{digits}f}"


def _print_trained(report: Any) -> None:
    for note in report.notes:
        typer.echo(f"note: {note}")
    held = "" if report.data_tokens is None else f" ({report.data_tokens:,} in the data)"
    amount = f"{report.steps:,} steps, {report.tokens:,} tokens{held}"
    learning = f"{report.num_trained:,} of {report.num_parameters:,} parameters"
    if report.dry_run:
        typer.echo(f"{amount}, {learning}: would be trained; nothing was (--dry-run)")
        return
    typer.echo(f"{amount}: loss {_figure(report.first_loss, 4)} at first, {_figure(report.last_loss, 4)} at last")
    if (report.first_eval_loss, report.last_eval_loss) != (None, None):
        before = f"loss {_figure(report.first_eval_loss, 4)} before, {_figure(report.last_eval_loss, 4)} after"
        after = f"perplexity {_figure(report.first_perplexity, 2)} before, {_figure(report.last_perplexity, 2)} after"
        typer.echo(f"measured on --eval-data: {before}; {after}")
    if report.tokens_per_second is not None:
        memory = f"at most {report.peak_memory / 1e9:.2f} GB of memory"
        resumed = "" if report.resumed_from is None else f", from step {report.resumed_from:,} on"
        typer.echo(f"{report.tokens_per_second:,.0f} tokens a second{resumed}, {memory}")
    typer.echo(f"{report.out}: {learning} trained")
    if report.pushed is not None:
        typer.echo(f"{report.pushed.url}: commit {report.pushed.commit}")


def main() -> None:
    """Run the command; exit 0 if done, 1 if a check failed, 2 for bad input, 130 if interrupted."""
    try:
        code = app(standalone_mode=False)
    except CheckFailed as error:
        _fail(error, 1)
    except (typer.TyperException, ValueError, OSError, ImportError) as error:
        _fail(error, 2)
    if code == INTERRUPTED:
        goes_on = {"convert": "; the same command with --resume goes on", "push": "; the same command goes on"}
        goes_on["fold"] = goes_on["grow"] = goes_on["train"] = goes_on["convert"]
        if is_main_process():
            typer.echo(f"gda: interrupted{goes_on.get(sys.argv[1], '')}", err=True)
    sys.exit(code or 0)


def _fail(error: Exception, code: int) -> NoReturn:
    if getattr(error, "told_elsewhere", False):
        sys.exit(code)  # another process of the same run says it
    message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
    typer.echo(f"gda: {' '.join(message.split())}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
