"""Fold a GDA model with a shared base and low-rank updates into the equal dense one."""

from pathlib import Path

from rich.console import Console

from gda.common.options import takes
from gda.common.screen import quiet_transformers
from gda.conversion.modes.registry import plan
from gda.conversion.options import FoldOptions
from gda.conversion.sources.open import open_source
from gda.conversion.writing.write_model import ConvertReport, write_model


@takes(FoldOptions)
def fold(options: FoldOptions, *, console: Console | None = None) -> ConvertReport:
    """Write a GDA model with `qk_rank` (arXiv 2501.17900) as the dense GDA model that computes the same.

    In a dtype narrower than float32 the products are rounded, so the logits are equal only up to that rounding. Tensors
    are streamed, and `out` appears only when it is complete and verified.

    Raises:
        ValueError: if there is nothing to fold, and for other bad input.
        FileNotFoundError, FileExistsError, OSError: for bad input.
        ImportError: naming the extra, if a package is missing that reads the source.
        CheckFailed: if a check of the result fails, such as that of its tokenizer; `out` is then not created.
        VerificationFailed: likewise, if the result does not compute what the model computes.
    """
    with quiet_transformers():
        source = open_source(options.model, options.revision)
        return write_model(plan("fold", source, options), source, Path(options.out), options, console=console)
