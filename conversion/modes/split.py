"""Llama, Mistral or Qwen → GDA with as many heads: some of its query heads become noise heads. This is lossy."""

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from gda.common.errors import errors_as
from gda.conversion.conversion import Conversion
from gda.conversion.modes.checks import losses
from gda.conversion.modes.expand import LAMBDA, signal_queries
from gda.conversion.noise_heads import divided
from gda.conversion.options import ConvertOptions
from gda.conversion.sources.source import Source
from gda.conversion.split.cost import work_bytes
from gda.conversion.split.recipes import drafts, split_config, split_recipes
from gda.conversion.split.splitter import Splitter
from gda.conversion.tensors.recipes import DTYPE_CHOICES

# The output projections, which are solved again.
SOLVED = r"model\.layers\.\d+\.self_attn\.o_proj\.weight"


def plan(source: Source, options: ConvertOptions) -> Conversion:
    """Divide the query heads of a source into signal and noise heads, and fit the result to the source."""
    dtype = DTYPE_CHOICES[options.dtype]
    lambda_type = options.lambda_type or "reparameterized"
    with errors_as(source.name, ValueError):
        heads, kv_heads = source.config.num_attention_heads, source.config.num_key_value_heads
        noise = divided(heads, kv_heads, noise_heads=options.noise_heads, ratio=options.ratio)
        config = split_config(source.config, noise_heads=noise, lambda_type=lambda_type, dtype=dtype)
    splitter = Splitter(source, config, options)
    recipes = split_recipes(config, source.specs, drafts(config), trained=None, seed=options.seed, dtype=dtype)
    expected = [splitter.expected(splitter.minutes())] if options.dry_run else []
    planned = Conversion(
        mode="split",
        config=config,
        recipes=recipes,
        lossless=False,
        notes=[
            "some heads become noise heads, which is not lossless",
            *losses(source, recipes, options.dtype),
            *splitter.short_texts(),
            *expected,
        ],
        settings={"split": splitter.settings()},
        kept={"query": signal_queries(config)},
        new=(LAMBDA, SOLVED),
        work_bytes=work_bytes(source.config, splitter.amount),
    )

    def fit(folder: Path, console: Console | None) -> Conversion:
        config, recipes, report = splitter.run(folder, dtype=dtype, console=console)
        return replace(planned, config=config, recipes=recipes, split=report)

    return replace(planned, work=fit)
