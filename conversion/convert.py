"""Convert a Llama, Mistral or Qwen, or a differential model, to a GDA model."""

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from gda.common.options import takes
from gda.common.places import GDA_REMEDY, IS_GDA
from gda.common.screen import quiet_transformers
from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.modes.low_rank import low_rank
from gda.conversion.modes.registry import plan, plan_default
from gda.conversion.options import ConvertOptions
from gda.conversion.push import push_result
from gda.conversion.sources.adapter import AdapterSource
from gda.conversion.sources.hub import require_token
from gda.conversion.sources.open import open_source
from gda.conversion.sources.source import Source
from gda.conversion.writing.write_model import ConvertReport, write_model


@takes(ConvertOptions)
def convert(options: ConvertOptions, *, console: Console | None = None) -> ConvertReport:
    """Convert a model to GDA.

    - `expand` keeps every query head of a Llama, Mistral, Qwen2 or Qwen3 as a signal head and adds noise heads. λ
      starts at exactly 0 with a non-zero gradient: the result computes what the source computes, and can be trained.
    - `map` keeps every tensor of a Motif or a DiffLlama bit for bit, renamed and reordered.
    - `restore` turns a plain model that `gda export` wrote back into the GDA model, if it was not trained since.
    - `split` keeps the number of heads: some of them become noise heads. The result is a different model that is fitted
      to the source on a calibration text. This is lossy, and the report gives the loss.

    With `qk_rank`, the queries, and paired keys, are then factorized into a shared base and low-rank updates, as in the
    Shared DIFF Transformer (arXiv 2501.17900). At full rank, the smaller of head_dim and hidden_size, this is exact.

    Tensors are streamed: at most a few of them are in memory. Verification loads source and result if they fit into a
    quarter of the free memory, and otherwise one layer at a time. `out` appears only when it is complete and verified.

    Raises:
        FileNotFoundError, FileExistsError, ValueError, OSError: for bad input, in one line that names the remedy.
        PermissionError, ConnectionError: if the Hub does not give the source or take the result.
        ImportError: naming the extra, if a package is missing that reads the source.
        CheckFailed: if a check of the result fails, such as that of its tokenizer; `out` is then not created.
        VerificationFailed: likewise, if the result does not compute what the source computes.
    """
    if options.push_to_hub is not None and not options.dry_run:
        require_token(options.push_to_hub)
    with quiet_transformers():
        report = convert_opened(open_source(options.source, options.revision), options, console=console)
    if options.push_to_hub is None or options.dry_run:
        return report
    pushed = push_result(
        report.out, options.push_to_hub, private=options.private, bundle_code=options.bundle_code, console=console
    )
    return replace(report, pushed=pushed)


def convert_opened(source: Source, options: ConvertOptions, *, console: Console | None = None) -> ConvertReport:
    """`convert` for an opened source, without the upload."""
    if isinstance(source.config, GDAConfig) and options.qk_rank is None and not isinstance(source, AdapterSource):
        raise ValueError(f"{source.name} {IS_GDA}; {GDA_REMEDY}")
    conversion = plan_default(source, options) if options.mode is None else plan(options.mode, source, options)
    if options.qk_rank is not None:
        conversion = low_rank(conversion, source, options.qk_rank)
    return write_model(conversion, source, Path(options.out), options, console=console)
