"""What the commands that write or push a model print about it."""

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:  # importing them takes a second
    from gda.conversion.push import PushReport
    from gda.conversion.split.report import SplitReport
    from gda.conversion.verify import VerifyReport
    from gda.conversion.writing.write_model import ConvertReport


def print_written(report: "ConvertReport") -> None:
    """Print notes, size, losses and verification of a `ConvertReport`."""
    for note in report.notes:
        typer.echo(f"note: {note}")
    files = f"{report.num_files} file{'s' * (report.num_files != 1)}"
    size = f"{report.num_parameters / 1e6:,.1f} M parameters, {report.nbytes / 1e6:,.0f} MB, {files}"
    if report.config.qk_rank is not None:
        typer.echo(rank_summary(report.config.qk_rank, report.num_parameters, report.num_dense_parameters))
    if report.dry_run:
        typer.echo(f"{size}: would be written to {report.out}; nothing was written (--dry-run)")
        return
    if report.split is not None:
        _print_split(report.split)
    for projection, errors in report.projection_errors.items():
        by_layer = "  ".join(f"{error:.2g}" for error in errors)
        typer.echo(f"relative error of the {projection} weights, layer by layer: {by_layer}")
    if report.verification is not None:
        print_verification(report.verification)
    typer.echo(f"{report.out}: {size}")


def print_pushed(pushed: "PushReport") -> None:
    """Print what a push left out, noted, removed and committed, or would commit."""
    for name in pushed.left_out:
        typer.echo(f"note: {name} is not part of a model and is not pushed")
    for note in pushed.notes:
        typer.echo(f"note: {note}")
    for name in pushed.removed:
        typer.echo(f"note: {name} belongs to an earlier model in the repository and is removed")
    size = f"{len(pushed.files)} files, {pushed.nbytes / 1e6:,.1f} MB"
    if pushed.dry_run:
        typer.echo("\n".join(pushed.files))
        typer.echo(f"{size}: would be pushed to {pushed.repo}; nothing was pushed (--dry-run)")
    else:
        result = f"commit {pushed.commit}, {size}" if pushed.changed else f"already up to date, {size}"
        typer.echo(f"{pushed.url}: {result}")


def _print_split(split: "SplitReport") -> None:
    lambdas = [layer.lambda_ for layer in split.layers]
    shares = [layer.subtracted for layer in split.layers]
    ratio = _times_the_source(split.perplexity / split.perplexity_source, split.ratio_interval)
    typer.echo(
        f"lossy: perplexity on {split.held_out_tokens:,} held-out tokens of {split.inside}: "
        f"source {split.perplexity_source:.3f}, closed form {split.perplexity_closed_form:.3f}, "
        f"result {split.perplexity:.3f} ({ratio})"
    )
    for text in split.texts:
        if text.text != split.inside:
            fitted = "" if text.fitted else " (not fitted to)"
            typer.echo(
                f"on {text.tokens:,} tokens of {text.text}{fitted}: {_times_the_source(text.ratio, text.interval)}"
            )
    for warning in split.warnings:
        typer.echo(f"warning: {warning}")
    typer.echo(
        f"λ from {min(lambdas):.3f} to {max(lambdas):.3f}; the subtracted part has {min(shares):.3f} to "
        f"{max(shares):.3f} of the energy of the attention output; conversion.json lists the layers"
    )


def _times_the_source(ratio: float, interval: tuple[float, float] | None) -> str:
    """The ratio of two perplexities in words."""
    words = f"{ratio:.3f} times the source's"
    return words if interval is None else words + ", 95 % interval {:.3f} to {:.3f}".format(*interval)


def rank_summary(rank: int, parameters: int, dense: int) -> str:
    """One line on the size of a model with `qk_rank`, compared with dense projections."""
    change = 100 * (parameters / dense - 1)
    return f"qk_rank {rank}: {parameters:,} parameters, {change:+.2f} % compared with {dense:,} with dense projections"


def print_verification(report: "VerifyReport") -> None:
    """Print a `VerifyReport` on one line."""
    done = "verified" if report.passed else "compared"
    tokenizers = ", tokenizers alike" if report.tokenizers_compared and report.different_tokenizer is None else ""
    if report.method == "tensors":
        count = len(report.different_tensors)
        typer.echo(f"{done} tensor by tensor, without running the models: {count} differ{tokenizers}")
        return
    assert report.greedy_match is not None  # only "tensors" has none of these
    assert report.top1_agreement is not None
    greedy = f", same greedy text {100 * report.greedy_match:.0f} %"
    if report.greedy_ties:
        greedy += f" and {100 * report.greedy_ties:.0f} % up to a tie"
    read = "text" if report.random_because is None else f"random ids, since {report.random_because}"
    limit = "no limit" if report.threshold is None else f"limit {report.threshold:.0e}"
    typer.echo(
        f"{done} ({report.method}, {report.tokens} tokens of {read}): |Δlogit| max {report.max_abs:.2e}, "
        f"mean {report.mean_abs:.2e}, relative {report.relative:.2e} ({limit}); KL {report.kl:.2e}; "
        f"same top token {100 * report.top1_agreement:.1f} %{greedy}{tokenizers}"
    )
