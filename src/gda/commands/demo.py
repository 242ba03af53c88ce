"""The command `gda demo`."""

from rich.console import Console

from gda.commands.app import JSON, Group, command, print_json, progress_console
from gda.conversion.options import DemoOptions


@command(DemoOptions, Group.CONVERT, examples=("gda demo", "gda demo --out smollm2-gda"))
def demo(options: DemoOptions, as_json: JSON = False) -> None:
    """Convert a Llama, by default SmolLM2-135M-Instruct, verify the result, and generate text with both models."""
    from gda.conversion.demo import demo as function

    report = function.run(options, console=progress_console if as_json else Console())
    if as_json:
        print_json(report.to_dict())
