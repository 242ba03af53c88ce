"""The command `gda verify`."""

from gda.commands.app import JSON, Group, command, print_json, progress_console
from gda.commands.written import print_verification
from gda.conversion.options import VerifyOptions


@command(
    VerifyOptions,
    Group.CONVERT,
    examples=("gda verify ./llama ./llama-gda", "gda verify ./llama ./llama-gda --method tensors --json"),
)
def verify(options: VerifyOptions, as_json: JSON = False) -> None:
    """Compare a converted model with its source: logits, generated text and tokenizers.

    The exit code is 1 if the check fails.
    """
    from gda.conversion.verify import VerificationFailed
    from gda.conversion.verify import verify as function

    report = function.run(options, console=progress_console)
    if as_json:
        print_json(report.to_dict())
    else:
        print_verification(report)
    if not report.passed:
        raise VerificationFailed(report)
