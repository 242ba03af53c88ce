"""`gda fold`."""

from gda.commands.app import JSON, Group, command, print_json, progress_console
from gda.commands.written import print_written
from gda.conversion.options import FoldOptions


@command(
    FoldOptions,
    Group.CONVERT,
    examples=(
        "gda fold ./llama-shared ./llama-gda",
        "gda fold ./llama-shared ./llama-gda --dtype float32",
    ),
)
def fold(options: FoldOptions, as_json: JSON = False) -> None:
    """Turn a GDA model with low-rank queries (qk_rank) into a dense GDA model with equal logits."""
    from gda.conversion.fold import fold as function

    report = function.run(options, console=progress_console)
    if as_json:
        print_json(report.to_dict())
    else:
        print_written(report)
