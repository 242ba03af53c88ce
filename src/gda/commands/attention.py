"""The command `gda attention`."""

from pathlib import Path
from typing import Annotated

import typer

from gda.commands.app import JSON, Group, command, print_json, progress_console
from gda.common.places import check_output
from gda.eval.options import OUTPUT, AttentionOptions

Page = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="HTML page to write, a single file. Default: none.", rich_help_panel=OUTPUT),
]
Picture = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Picture to write; needs matplotlib. Default: none.", rich_help_panel=OUTPUT),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", metavar="", help="Replace existing files.", rich_help_panel=OUTPUT)
]


@command(
    AttentionOptions,
    Group.EVALUATE,
    examples=(
        "gda attention ./llama-gda --text 'The cat sat on the mat.' --out report.html",
        "gda attention ./llama-gda --baseline ./llama --file text.txt --out report.html --png report.png",
        "gda attention me/llama-gda --file text.txt --layers 11,12 --out layers.html --overwrite",
        "gda attention ./llama-gda --text 'The cat sat.' --json",
    ),
)
def attention(
    options: AttentionOptions,
    out: Page = None,
    png: Picture = None,
    overwrite: Overwrite = False,
    as_json: JSON = False,
) -> None:
    """Show a model's attention on one text: signal, noise and their difference, by layer, group and token.

    The page works offline. Maps that exceed --map-megabytes are averaged, and the page says so. The numbers are always
    computed from the full maps.
    """
    if out is None and png is None and not as_json:
        raise ValueError("nothing to write: name --out FILE, --png FILE or --json")
    _check_outputs(options, out, png, overwrite=overwrite)
    from gda.eval.attention.attention import attention as function

    report = function.run(options, console=progress_console)
    written = [report.write_html(out, overwrite=overwrite)] if out is not None else []
    written += [report.write_png(png, overwrite=overwrite)] if png is not None else []
    for note in report.notes:
        typer.echo(f"note: {note}", err=as_json)
    for path in written:
        typer.echo(f"wrote {path} ({path.stat().st_size / 1e6:,.1f} MB)", err=as_json)
    if as_json:
        print_json(report.to_dict())


def _check_outputs(options: AttentionOptions, out: str | None, png: str | None, *, overwrite: bool) -> None:
    """Check that everything can be written before anything is run."""
    for option, place in (("--out", out), ("--png", png)):
        if place is not None:
            path = check_output(place, overwrite, option)
            if options.file is not None and path.exists() and path.samefile(options.file):
                raise ValueError(f"{option} {place} is the text to read; choose another file")
    if out is not None and png is not None and Path(out).resolve() == Path(png).resolve():
        raise ValueError(f"--out and --png name the same file, {out}; name two files")
    if png is not None:
        import gda.eval.attention.picture  # noqa: F401 - names the remedy if matplotlib is missing
