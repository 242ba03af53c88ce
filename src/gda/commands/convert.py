"""`gda convert`."""

import typer

from gda.commands.app import JSON, Group, command, print_json, progress_console
from gda.commands.written import print_pushed, print_written
from gda.conversion.options import ConvertOptions


@command(
    ConvertOptions,
    Group.CONVERT,
    examples=(
        "gda convert meta-llama/Llama-3.2-1B llama-gda",
        "gda convert ./llama ./llama-gda --ratio 4:1 --max-shard-size 2GB",
        "gda convert model.gguf model-gda --dry-run",
        "gda convert Motif-Technologies/Motif-2.6B motif-gda",
        "gda convert ./llama ./llama-split --mode split --calibration text.txt",
        "gda convert ./llama-gda ./llama-shared --qk-rank 32",
    ),
)
def convert(options: ConvertOptions, as_json: JSON = False) -> None:
    """Convert a Llama, Mistral, Qwen2 or Qwen3 into a GDA model that computes the same function.

    By default, every query head becomes a signal head, noise heads are added, and λ starts at 0 and can be trained.
    A Motif or a DiffLlama already has noise heads: its tensors are renamed and reordered.
    With --mode split, some heads of a Llama, Mistral or Qwen become noise heads, which is lossy.
    OUT appears only when it is complete and verified.
    """
    from gda.conversion.convert import convert as function

    report = function.run(options, console=progress_console)
    if as_json:
        print_json(report.to_dict())
        return
    typer.echo(report.to_dict()["head_map"])
    print_written(report)
    if report.is_plain:
        typer.echo(
            "one λ per layer, no head norm: `gda export` can write this model as a plain one, before and after training"
        )
    if report.pushed is not None:
        print_pushed(report.pushed)
