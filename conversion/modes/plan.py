"""What a conversion will make of its source: the configuration, and a recipe for each tensor."""

from transformers import PreTrainedConfig

from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.families.registry import DIFFERENTIAL_FAMILIES
from gda.conversion.modes.expand import expanded_config, expanded_recipes
from gda.conversion.modes.low_rank import same_config, same_recipes
from gda.conversion.modes.split import drafts, split_config, split_recipes
from gda.conversion.sources.source import Source
from gda.conversion.tensors.recipes import Recipe
from gda.conversion.writing.provenance import DTYPES

MODES = ("expand", "split", "map")


def mode_of(config: PreTrainedConfig, mode: str | None) -> str:
    """The mode to convert a source of that config in: `mode` if it is given and fits, else the lossless one.

    Raises:
        ValueError: if `mode` does not fit, or is none.
    """
    if mode is not None and mode not in MODES:
        raise ValueError(f"--mode {mode} is not one of {', '.join(MODES)}")
    is_differential = isinstance(config, GDAConfig) or config.model_type in DIFFERENTIAL_FAMILIES
    fitting = ("map",) if is_differential else ("expand", "split")
    if mode is not None and mode not in fitting:
        reason = "has noise heads already" if is_differential else "has no noise heads to map"
        modes = " or ".join(fitting)
        raise ValueError(f"--mode {mode}: a {config.model_type} model {reason}; use --mode {modes}, or leave it away")
    return mode or fitting[0]


def planned_config(
    source: Source,
    *,
    mode: str,
    noise_heads: int | None,
    lambda_type: str,
    dtype: str,
    merge_kv: int | None = None,
) -> GDAConfig:
    """The configuration of the result.

    Raises:
        ValueError: for what cannot be.
    """
    if isinstance(source.config, GDAConfig):
        return same_config(source.config, DTYPES[dtype])
    if mode == "map":
        return DIFFERENTIAL_FAMILIES[source.config.model_type].config(source.config, DTYPES[dtype])
    if mode == "split":
        return split_config(
            source.config, noise_heads=noise_heads, lambda_type=lambda_type, dtype=DTYPES[dtype], merge_kv=merge_kv
        )
    return expanded_config(source.config, noise_heads=noise_heads, lambda_type=lambda_type, dtype=DTYPES[dtype])


def planned_recipes(source: Source, config: GDAConfig, *, mode: str, seed: int, dtype: str) -> dict[str, Recipe]:
    """How each tensor of the result is made, in the order in which transformers saves them.

    Of a split, before it is done, this says which tensors there will be, and no more.
    """
    if isinstance(source.config, GDAConfig):
        return same_recipes(config, source.specs, DTYPES[dtype])
    if mode == "map":
        return DIFFERENTIAL_FAMILIES[source.config.model_type].recipes(config, source.specs, DTYPES[dtype])
    if mode == "split":
        splits = drafts(config, source.config)
        return split_recipes(config, source.specs, splits, merged=None, trained=None, seed=seed, dtype=DTYPES[dtype])
    return expanded_recipes(config, source.specs, seed=seed, dtype=DTYPES[dtype])
