"""The command `gda inspect`."""

import typer
from rich.console import Console
from rich.table import Table

from gda.commands.app import JSON, Group, command, print_json
from gda.commands.written import rank_summary
from gda.conversion.options import InspectOptions


@command(InspectOptions, Group.CONVERT, examples=("gda inspect ./llama-gda", "gda inspect me/llama-gda --json"))
def inspect(options: InspectOptions, as_json: JSON = False) -> None:
    """Show the heads, parameters, KV cache and λ of a GDA model without running it."""
    from gda.conversion.inspect import inspect as function

    report = function.run(options)
    if as_json:
        print_json(report.to_dict())
        return
    typer.echo(f"{report.name}  {report.kv_layout} keys and values, head_dim {report.head_dim}, {report.dtype}\n")
    typer.echo(report.head_map)
    table = Table("part", "parameters", "share")
    for part, number in report.parameters.items():
        if number:
            table.add_row(part, f"{number:,}", f"{100 * number / report.num_parameters:.2f} %")
    table.add_row("total", f"{report.num_parameters:,}", "")
    Console().print(table)
    if report.qk_rank is not None:
        typer.echo(rank_summary(report.qk_rank, report.num_parameters, report.num_dense_parameters))
    source = report.source_kv_cache_bytes_per_token
    comparison = "" if source is None else f" (source: {source:,})"
    typer.echo(f"KV cache: {report.kv_cache_bytes_per_token:,} bytes per token{comparison}")
    typer.echo(f"λ ({report.lambda_type}): {_lambda_summary(report.lambdas)}")


def _lambda_summary(lambdas: list[float | None]) -> str:
    known = [value for value in lambdas if value is not None]
    if not known:
        return "depends on the token in every layer"
    if len(known) == len(lambdas) and len(set(known)) == 1:
        return f"{known[0]:.4g} in every layer"
    return "  ".join("token" if value is None else f"{value:.4g}" for value in lambdas)
