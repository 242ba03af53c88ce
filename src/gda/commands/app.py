"""The command-line application: how a command is made from its options, and what all commands share."""

import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import MISSING, Field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from rich.console import Console
from typer._click.core import Context
from typer.core import TyperCommand

from gda._version import __version__
from gda.common.errors import Interrupted
from gda.common.numbers import finite
from gda.common.options import HUB, OUTPUT, PERPLEXITY, Options, choices, declared, flag, kinds_of
from gda.common.progress import is_main_process


class Group(StrEnum):
    """The groups of commands in `gda --help`, in the order of use."""

    CONVERT = "Convert and grow"
    TRAIN = "Train"
    EVALUATE = "Evaluate and look"
    SHARE = "Share and serve"


app = typer.Typer(
    help="Grouped Differential Attention: convert, train, evaluate and serve differential language models.",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
progress_console = Console(stderr=True)
INTERRUPTED = 130  # the exit code
LAST_PANELS = (PERPLEXITY, OUTPUT, HUB)

JSON = Annotated[bool, typer.Option("--json", help="Print the report as JSON.", metavar="", rich_help_panel=OUTPUT)]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", metavar="", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def command(
    options: type[Options], group: Group, *, name: str | None = None, examples: tuple[str, ...] = (), **settings: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate `function(options, …)` so that it becomes the command `gda name`. Default: the function's name.

    The fields of `options` are the command's arguments and options; further parameters of the function, annotated for
    Typer, exist on the command line alone. Its docstring is the text of `--help`.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(function).parameters.values())[1:]
        names = [each.name for each, _ in declared(options)]

        def run(**given: Any) -> None:
            values = {each: given.pop(each) for each in names}
            values = {each: tuple(value) if isinstance(value, list) else value for each, value in values.items()}
            checked = options(**values)
            checked.check_places()
            try:
                function(checked, **given)
            except Interrupted as stop:  # Typer would turn it into a code and drop the message
                if is_main_process():
                    typer.echo(f"gda: {stop}", err=True)
                raise SystemExit(INTERRUPTED) from None

        run.__doc__ = function.__doc__
        parameters = [_parameter(each, hint) for each, hint in declared(options)]
        parameters += [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own]
        run.__signature__ = inspect.Signature(sorted(parameters, key=_place_in_help))  # type: ignore[attr-defined]
        epilog = "\n".join(["Examples:", *(f"  {each}" for each in examples)]) if examples else None
        app.command(name or function.__name__, cls=_Command, rich_help_panel=group, epilog=epilog, **settings)(run)
        return function

    return decorate


class _Command(TyperCommand):
    """A command that refuses a switch together with its opposite; otherwise the last one would count."""

    def parse_args(self, context: Context, arguments: list[str]) -> list[str]:
        for each in self.params:
            given = [name for names in (each.opts, each.secondary_opts) for name in names if name in arguments]
            if each.secondary_opts and len(given) > 1:
                raise ValueError(f"{' and '.join(given)} exclude each other; pass one of them")
        return super().parse_args(context, arguments)


def _parameter(each: Field[Any], hint: Any) -> inspect.Parameter:
    about, name = each.metadata, each.name.replace("_", "-")
    default = inspect.Parameter.empty if each.default is MISSING else each.default
    allowed = choices(hint)
    if about["positional"]:
        info = typer.Argument(help=about["help"], metavar=name.upper())
    else:
        is_switch = hint is bool and default is False
        spelled = about["flag"] or (flag(each.name) if is_switch else None)
        help = f"{about['help']} Choices: {', '.join(allowed)}." if allowed else about["help"]
        metavar = "" if bool in (hint, *get_args(hint)) else about["metavar"] or (name.upper() if allowed else None)
        flags = () if spelled is None else (spelled,)
        info = typer.Option(*flags, help=help, metavar=metavar, rich_help_panel=about["panel"])
    if isinstance(default, tuple):
        default = list(default) or None
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(each.name, kind, default=default, annotation=Annotated[_as_typed(hint), info])


def _place_in_help(parameter: inspect.Parameter) -> int:
    """0 for most parameters, more for those of the panels that every command lists last."""
    panels = [getattr(each, "rich_help_panel", None) for each in getattr(parameter.annotation, "__metadata__", ())]
    return max((LAST_PANELS.index(panel) + 1 for panel in panels if panel in LAST_PANELS), default=0)


def _as_typed(hint: Any) -> Any:
    """The type that Typer parses for a field: text for a path or a choice (`Options` checks it), a list for a tuple."""
    if hint is Path or get_origin(hint) is Literal:
        return str
    if get_origin(hint) is tuple:
        return list[_as_typed(get_args(hint)[0])] | None  # type: ignore[misc]
    kinds = kinds_of(hint)
    if len(kinds) == 1:
        return hint
    typed = [_as_typed(each) for each in kinds if each is not type(None)]
    # Text covers paths, names and numbers, and float covers int.
    widest: Any = next(each for each in (str, float, *typed) if each in typed)
    return widest | None if type(None) in kinds else widest


def print_json(report: dict[str, Any]) -> None:
    """Print a report on standard output. Numbers that are not finite become null."""
    escapes = (sys.stdout.encoding or "utf-8").lower() not in ("utf-8", "utf8")
    typer.echo(json.dumps(finite(report), indent=2, ensure_ascii=escapes))
