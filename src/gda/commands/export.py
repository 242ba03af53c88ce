"""The command `gda export`."""

import typer

from gda.commands.app import JSON, Group, command, print_json, progress_console
from gda.conversion.options import ExportOptions


@command(
    ExportOptions,
    Group.CONVERT,
    examples=(
        "gda export ./llama-gda ./llama-again",
        "gda export ./qwen-gda ./qwen-again --format qwen3",
        "gda export ./motif-gda ./motif-again --format motif",
    ),
)
def export(options: ExportOptions, as_json: JSON = False) -> None:
    """Export a GDA model to the model type it was converted from, bit for bit.

    A Motif or a DiffLlama keeps its λ. A Llama, Mistral or Qwen has no λ, so it must still be 0 in every layer.
    """
    from gda.conversion.export import export as function

    report = function.run(options, console=progress_console)
    if as_json:
        print_json(report.to_dict())
        return
    for note in report.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"{report.out}: {report.num_parameters / 1e6:,.1f} M parameters, {report.num_tensors} tensors")
