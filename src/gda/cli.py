"""The command `gda`. Nothing heavy is imported before a command runs."""

import sys
from difflib import get_close_matches
from io import TextIOWrapper
from typing import NoReturn

import typer
from typer._click.exceptions import NoSuchOption

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
from gda.commands.app import INTERRUPTED, app
from gda.common.errors import CheckFailed, first_line, is_out_of_memory
from gda.common.progress import is_main_process, log_on_stderr

# How to go on with an interrupted command.
GO_ON = dict.fromkeys(
    ("convert", "export", "fold", "grow", "train"), "; run the same command with --resume to continue"
)
GO_ON["demo"] = GO_ON["push"] = "; run the same command again to continue"


def main() -> None:
    """Run the command; exit 0 if done, 1 if a check failed, 2 for bad input, 130 if interrupted."""
    # As on standard error, for a locale whose encoding has no λ.
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with log_on_stderr():
            code = app(standalone_mode=False)
    except CheckFailed as error:
        _fail(error, 1)
    except (typer.TyperException, ValueError, OSError, ImportError) as error:
        _fail(error, 2)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        _fail(MemoryError(f"not enough memory: {first_line(error)}" if str(error) else "not enough memory"), 2)
    if code == INTERRUPTED and is_main_process():
        typer.echo(f"gda: interrupted{_how_to_go_on(*sys.argv[1:])}", err=True)
    sys.exit(code or 0)


def _how_to_go_on(command: str = "", *arguments: str) -> str:
    if command == "export" and any(each.endswith(".gguf") for each in arguments):
        return ""  # it writes one file, and has no --resume
    return GO_ON.get(command, "")


def _fail(error: Exception, code: int) -> NoReturn:
    if getattr(error, "reported_elsewhere", False):
        sys.exit(code)  # another process of the same run prints it
    if isinstance(error, NoSuchOption):
        message = f"there is no option {error.option_name}{_suggestion(error)}"
    else:
        message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
    typer.echo(f"gda: {' '.join(message.split())}", err=True)
    sys.exit(code)


def _suggestion(error: NoSuchOption) -> str:
    """The options that a user may have meant: by initials, as in --lr, by a part, as in --max-steps, or by letters."""
    wanted = error.option_name.lstrip("-").replace("_", "-")
    parameters = error.ctx.command.params if error.ctx is not None else []
    names = [name for each in parameters for name in (*each.opts, *each.secondary_opts)]
    known = [name.removeprefix("--") for name in names if name.startswith("--")]
    near = [name for name in known if "".join(part[0] for part in name.split("-")) == wanted]
    near = near or get_close_matches(wanted, known, cutoff=0.7)
    near = near or [name for name in known if len(wanted) > 2 and (wanted in name or name in wanted)]
    if not near:
        return f"; `{error.ctx.command_path if error.ctx else 'gda'} --help` lists the options"
    return f"; did you mean {' or '.join(f'--{name}' for name in near[:3])}?"


if __name__ == "__main__":
    main()
