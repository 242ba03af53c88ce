"""Export a GDA model to a Llama, Mistral, Qwen, Motif or DiffLlama that computes the same."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from gda.common.options import takes
from gda.common.screen import quiet_transformers
from gda.conversion.modes.registry import plan
from gda.conversion.options import ExportOptions
from gda.conversion.sources.open import open_source
from gda.conversion.writing.gguf_file import write_gguf
from gda.conversion.writing.write_model import ConvertReport, write_model


@dataclass(frozen=True, kw_only=True)
class ExportReport(ConvertReport):
    """What was exported, or with `dry_run` would be: the report of a conversion to another model type.

    Attributes:
        out: The folder, or the GGUF file.
        config: Configuration of the result.
        nbytes: Size of the tensors, or of a GGUF file.
        verification: The report of `verify`; None if it was not asked for, or transformers cannot run the format.
        format: The model type, or "gguf".
        num_attention_heads, num_key_value_heads: Numbers of heads of the result.
    """

    format: str
    num_attention_heads: int
    num_key_value_heads: int

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        names = (
            *("out", "format", "num_attention_heads", "num_key_value_heads", "num_tensors", "num_parameters", "nbytes"),
            *("sha256", "notes", "verification", "dry_run", "file_type"),
        )
        verification = None if self.verification is None else self.verification.to_dict()
        return {name: getattr(self, name) for name in names} | {"out": str(self.out), "verification": verification}


@takes(ExportOptions)
def export(options: ExportOptions, *, console: Console | None = None) -> ExportReport:
    """Export a GDA model to another model type.

    A Llama, Mistral, Qwen2 or Qwen3 can hold every model whose λ is one number per layer and that has no head norm: its
    signal and noise heads become query heads, and the output projection subtracts. The products are computed in float64
    and rounded once. While λ is 0, the signal heads alone are written, which are the source's tensors bit for bit where
    they were not trained. Motif and DiffLlama keep λ. `format="gguf"` writes the plain model as one file for llama.cpp.

    Raises:
        ValueError: naming the field or the layer, if the other type cannot compute what the model computes.
        FileNotFoundError, FileExistsError, OSError: for bad input.
        ImportError: naming the extra, if a package is missing that reads the source.
        CheckFailed: if a check of the result fails, such as that of its tokenizer; `out` is then not created.
        VerificationFailed: likewise, if the result does not compute what the model computes.
    """
    out = Path(options.out)
    with quiet_transformers():
        source = open_source(options.model, options.revision)
        if options.format == "gguf":  # the writer rounds to the type of the file
            matrices = {str(spec.dtype) for spec in source.specs.values() if len(spec.shape) > 1}
            unchanged = options.dtype == "keep" or matrices == {f"torch.{options.dtype}"}
            planned = replace(options, dtype="keep" if unchanged else "float32")
            conversion = plan("export", source, planned)
            written = write_gguf(conversion, source, out, options, console=console)
        else:
            conversion = plan("export", source, options)
            written = write_model(conversion, source, out, options, console=console)
    config = conversion.config
    return ExportReport(
        **vars(written),
        format="gguf" if options.format == "gguf" else config.model_type,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
    )
