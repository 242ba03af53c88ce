"""The command `gda`. Nothing heavy is imported before a command runs."""

import sys
from typing import NoReturn

import typer

from gda.commands import (  # noqa: F401 - registers the commands, in the order of `gda --help`  # isort: skip
    convert,
    grow,
    fold,
    export,
    verify,
    inspect,
    train,
    eval,
    attention,
    demo,
    push,
    serve,
)
from gda.commands.app import app, is_main_process
from gda.common.errors import CheckFailed

INTERRUPTED = 130
# How to continue an interrupted command. The others start over.
GO_ON = dict.fromkeys(("convert", "fold", "grow", "train"), "; run the same command with --resume to continue")
GO_ON["push"] = "; run the same command again to continue"


def main() -> None:
    """Run the command; exit 0 if done, 1 if a check failed, 2 for bad input, 130 if interrupted."""
    try:
        code = app(standalone_mode=False)
    except CheckFailed as error:
        _fail(error, 1)
    except (typer.TyperException, ValueError, OSError, ImportError) as error:
        _fail(error, 2)
    if code == INTERRUPTED and is_main_process():
        typer.echo(f"gda: interrupted{GO_ON.get(sys.argv[1], '')}", err=True)
    sys.exit(code or 0)


def _fail(error: Exception, code: int) -> NoReturn:
    if getattr(error, "reported_elsewhere", False):
        sys.exit(code)  # another process of the same run prints it
    message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
    typer.echo(f"gda: {' '.join(message.split())}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
