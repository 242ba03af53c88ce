"""The command `gda push`."""

from gda.commands.app import JSON, Group, command, print_json, progress_console
from gda.commands.written import print_pushed
from gda.conversion.options import PushOptions


@command(
    PushOptions,
    Group.SHARE,
    examples=(
        "gda push ./llama-gda me/llama-gda",
        "gda push ./llama-gda me/llama-gda --private --revision v2",
        "gda push ./llama-gda me/llama-gda --dry-run",
    ),
)
def push(options: PushOptions, as_json: JSON = False) -> None:
    """Push a GDA model to the Hub in one commit, with a model card and the model's code.

    After an interruption, run the same command again: uploaded weights are not sent twice.
    """
    from gda.conversion.push import push as function

    report = function.run(options, console=progress_console)
    if as_json:
        print_json(report.to_dict())
        return
    print_pushed(report)
