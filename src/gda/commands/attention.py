"""The command `gda attention`."""

from dataclasses import dataclass
from pathlib import Path

import typer

from gda.commands.app import JSON, Group, command, print_json, progress_console
from gda.common.options import option
from gda.common.places import check_output
from gda.eval.options import OUTPUT, AttentionOptions


@dataclass(frozen=True)
class AttentionOutputOptions(AttentionOptions):
    """Options of `gda attention`: those of `gda.attention`, and the files that are written."""

    out: str | None = option(None, "HTML page to write, a single file. Default: none.", panel=OUTPUT, metavar="FILE")
    png: str | None = option(None, "Picture to write; needs matplotlib. Default: none.", panel=OUTPUT, metavar="FILE")
    overwrite: bool = option(False, "Replace existing files.", panel=OUTPUT)


@command(
    AttentionOutputOptions,
    Group.EVALUATE,
    examples=(
        "gda attention ./llama-gda --text 'The cat sat on the mat.' --out report.html",
        "gda attention ./llama-gda --baseline ./llama --file text.txt --out report.html --png report.png",
        "gda attention me/llama-gda --file text.txt --layers 11,12 --out layers.html --overwrite",
        "gda attention ./llama-gda --text 'The cat sat.' --json",
    ),
)
def attention(options: AttentionOutputOptions, as_json: JSON = False) -> None:
    """Show a model's attention on one text: signal, noise and their difference, by layer, group and token.

    Name at least one of --out, --png and --json. The page works offline. Maps that exceed --map-megabytes are averaged,
    and the page says so. The numbers are always computed from the full maps.
    """
    out, png, overwrite = options.out, options.png, options.overwrite
    if out is None and png is None and not as_json:
        raise ValueError("nothing to write: name --out FILE, --png FILE or --json")
    _check_outputs(options)
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


def _check_outputs(options: AttentionOutputOptions) -> None:
    """Check that everything can be written before anything is run."""
    out, png = options.out, options.png
    for name, place in (("--out", out), ("--png", png)):
        if place is not None:
            path = check_output(place, options.overwrite, name)
            if options.file is not None and path.exists() and path.samefile(options.file):
                raise ValueError(f"{name} {place} is the text to read; choose another file")
    if out is not None and png is not None and Path(out).resolve() == Path(png).resolve():
        raise ValueError(f"--out and --png name the same file, {out}; name two files")
    if png is not None:
        import gda.eval.attention.picture  # noqa: F401 - names the remedy if matplotlib is missing
