"""The command `gda export`."""

import typer

from gda.commands.app import JSON, Group, command, print_json, progress_console
from gda.commands.written import print_verification
from gda.conversion.options import ExportOptions


@command(
    ExportOptions,
    Group.CONVERT,
    examples=(
        "gda export ./llama-gda ./llama",
        "gda export ./trained-gda ./trained-llama --dtype bfloat16",
        "gda export ./qwen-gda ./qwen --format qwen3",
        "gda export ./trained-gda ./trained.gguf --format gguf --dtype q8_0",
        "gda export ./motif-gda ./motif --format motif",
    ),
)
def export(options: ExportOptions, as_json: JSON = False) -> None:
    """Export a GDA model as a Llama, Mistral, Qwen, GGUF file, Motif or DiffLlama that computes the same function.

    A Llama, Mistral or Qwen can hold every model whose λ is one number per layer and that has no head norm. Its signal
    and noise heads become query heads. While λ is 0, only the signal heads are written.
    The formats motif and diffllama keep the noise heads and λ. --format gguf writes the plain model as
    one file for llama.cpp.
    """
    from gda.conversion.export import export as function

    report = function.run(options, console=progress_console)
    if as_json:
        print_json(report.to_dict())
        return
    for note in report.notes:
        typer.echo(f"note: {note}")
    if report.verification is not None:
        print_verification(report.verification)
    heads = f"{report.num_attention_heads} query heads over {report.num_key_value_heads} KV heads"
    size = f"{report.num_parameters / 1e6:,.1f} M parameters, {report.num_tensors} tensors"
    kind = report.format
    if report.file_type is not None:
        kind = f"GGUF file, {report.file_type}, {report.nbytes / 1e6:,.0f} MB"
    if report.dry_run:
        typer.echo(f"a {kind}, {heads}, {size}: would be written to {report.out}; nothing was written (--dry-run)")
    else:
        typer.echo(f"{report.out}: a {kind}, {heads}, {size}")
