"""`gda grow`."""

import typer

from gda.commands.app import JSON, Group, command, print_json, progress_console
from gda.commands.written import print_written
from gda.conversion.options import GrowOptions


@command(
    GrowOptions,
    Group.CONVERT,
    examples=(
        "gda grow ./llama-gda ./bigger --signal 2",
        "gda grow ./llama-gda ./bigger --depth 40",
        "gda grow ./llama-gda ./bigger --signal 2 --layers 9,14,19,24,28,29",
        "gda grow ./llama ./bigger --width 2",
        "gda grow ./llama-gda ./bigger --masked --signal 2 --mlp 1.5 --depth 36",
    ),
)
def grow(options: GrowOptions, as_json: JSON = False) -> None:
    """Grow a model: add signal heads, layers or width.

    The grown model computes the same function and has more trainable parameters.
    With --masked, training fades the new parts in, from random weights or, for new layers, from copies.
    The options can be combined. OUT contains trainable.json, which lists the new parameters.
    """
    from gda.conversion.grow import grow as function

    report = function.run(options, console=progress_console)
    numbers = report.to_dict()
    if as_json:
        print_json(numbers)
        return
    for when, suffix in (("before", "_before"), ("after", "")):
        size = f"hidden size {numbers[f'hidden_size{suffix}']:,}, {numbers[f'num_parameters{suffix}']:,} parameters"
        typer.echo(f"{when}\n{numbers[f'head_map{suffix}']}, {size}\n")
    if report.copied_layers:
        copied, new = (", ".join(map(str, layers)) for layers in (report.copied_layers, report.new_layers))
        typer.echo(
            f"new layers {new}, after layers {copied}"
            if options.masked
            else f"layers copied: {copied}; the copies are {new}"
        )
    print_written(report)
