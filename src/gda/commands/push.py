"""The command `gda push`."""

import typer

from gda.commands.app import JSON, Group, command, print_json, progress_console
from gda.conversion.options import PushOptions


@command(
    PushOptions,
    Group.SHARE,
    examples=(
        "gda push ./llama-gda me/llama-gda",
        "gda push ./llama-gda me/llama-gda --private --revision v2",
        "gda push ./llama-gda me/llama-gda --dry-run",
    ),
)
def push(options: PushOptions, as_json: JSON = False) -> None:
    """Push a GDA model to the Hub in one commit, with a model card and the model's code.

    After an interruption, run the same command again: uploaded weights are not sent twice.
    """
    from gda.conversion.push import push as function

    report = function.run(options, console=progress_console)
    if as_json:
        print_json(report.to_dict())
        return
    for name in report.left_out:
        typer.echo(f"note: {name} is not part of a model and is not pushed")
    for note in report.notes:
        typer.echo(f"note: {note}")
    for name in report.removed:
        typer.echo(f"note: {name} belongs to an earlier model in the repository and is removed")
    size = f"{len(report.files)} files, {report.nbytes / 1e6:,.1f} MB"
    if report.dry_run:
        typer.echo("\n".join(report.files))
        typer.echo(f"{size}: would be pushed to {report.repo}; nothing was pushed (--dry-run)")
    else:
        result = f"commit {report.commit}, {size}" if report.changed else f"already up to date, {size}"
        typer.echo(f"{report.url}: {result}")
