"""The command `gda demo`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gda.commands.app import JSON, Group, command, print_json, progress_console
from gda.common.files import check_places, refuse_existing
from gda.conversion.options import OUTPUT, DemoOptions

OUT = Annotated[
    str | None,
    typer.Option(help="Folder to save the converted model to. Default: it is not saved.", rich_help_panel=OUTPUT),
]


@command(DemoOptions, Group.CONVERT, examples=("gda demo", "gda demo --out smollm2-gda"))
def demo(options: DemoOptions, out: OUT = None, as_json: JSON = False) -> None:
    """Convert SmolLM2-135M-Instruct to GDA at 3:1, verify the result, and generate text with both models."""
    if out is not None:
        check_places(options.source or "", out)
        refuse_existing(Path(out), options.overwrite)
    from gda.conversion.demo import demo as function

    report = function.run(options, out, console=progress_console if as_json else Console())
    if as_json:
        print_json(report.to_dict())
