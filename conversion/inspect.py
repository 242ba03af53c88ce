"""Describe a GDA model: heads, parameters, KV cache, λ."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gda.common.files import read_json
from gda.common.options import takes
from gda.common.screen import quiet_transformers
from gda.configuration.configuration_gda import MASKED, GDAConfig
from gda.conversion.modes.low_rank import dense_specs
from gda.conversion.options import InspectOptions
from gda.conversion.sources.adapter import AdapterSource
from gda.conversion.sources.folder import FolderSource
from gda.conversion.sources.open import open_source
from gda.conversion.sources.source import PROVENANCE_FILE
from gda.conversion.tensors.lambdas import layer_lambdas
from gda.conversion.writing.headmap import head_map, in_masked_growth

PARTS = {
    "embedding": r"embed_tokens\.",
    "signal and noise queries": r"\.q_(proj|norm|base|down|up)\.",
    "keys and values": r"\.(k_(proj|norm|base|down|up)|v_proj)\.",
    "attention output": r"\.o_proj\.",
    "λ": r"\.lambda_",
    "MLP": r"\.mlp\.",
    "norms": r"norm\.|\.subln\.",
    "language-model head": r"^lm_head\.",
}


@dataclass(frozen=True)
class InspectReport:
    """Layout and size of a GDA model.

    Attributes:
        head_map: A drawing of which query heads read which KV heads.
        parameters: Number of parameters by part.
        qk_rank: Rank of the updates of queries, and of paired keys; None where they are dense.
        num_dense_parameters: Number of parameters of the same model with dense queries and keys.
        kv_cache_bytes_per_token: Size of the cache over all layers, in the checkpoint's dtype.
        source_kv_cache_bytes_per_token: The same for the model it was converted from; None if that is not known.
        lambda_type: How λ is computed.
        lambdas: λ of each layer; None where it depends on the token.
        growth: The config's fields of masked growth while it is in progress; None otherwise.
    """

    name: str
    head_map: str
    num_layers: int
    num_signal_heads: int
    num_noise_heads: int
    num_key_value_heads: int
    head_dim: int
    kv_layout: str
    dtype: str
    num_parameters: int
    parameters: dict[str, int]
    qk_rank: int | None
    num_dense_parameters: int
    kv_cache_bytes_per_token: int
    source_kv_cache_bytes_per_token: int | None
    lambda_type: str
    lambdas: list[float | None]
    growth: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return asdict(self)


@takes(InspectOptions)
def inspect(options: InspectOptions) -> InspectReport:
    """Describe a GDA model from its config, the headers of its files and λ. A Hub id is downloaded first.

    Raises:
        ValueError: if it is not a GDA model.
        FileNotFoundError: if it doesn't exist.
    """
    with quiet_transformers():
        source = open_source(options.model, options.revision)
    config = source.config
    if isinstance(source, AdapterSource):
        raise ValueError(f"{options.model} is an adapter; merge it with `gda convert`, and inspect the result")
    if not isinstance(source, FolderSource) or not isinstance(config, GDAConfig):
        raise ValueError(
            f"{options.model} is a {config.model_type!r} model, not a GDA model; convert it with `gda convert`"
        )
    parameters = dict.fromkeys(PARTS, 0)
    for name, spec in source.specs.items():
        parameters[next(part for part, pattern in PARTS.items() if re.search(pattern, name))] += spec.numel
    dtype = source.specs["model.embed_tokens.weight"].dtype
    growth = {name: getattr(config, name) for name in ("fade", *MASKED, "blended_layers")}
    return InspectReport(
        name=source.name,
        head_map=head_map(config),
        num_layers=config.num_hidden_layers,
        num_signal_heads=config.num_signal_heads,
        num_noise_heads=config.num_noise_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        kv_layout=config.kv_layout,
        dtype=str(dtype).removeprefix("torch."),
        num_parameters=sum(parameters.values()),
        parameters=parameters,
        qk_rank=config.qk_rank,
        num_dense_parameters=sum(spec.numel for spec in dense_specs(config).values()),
        kv_cache_bytes_per_token=_cache(vars(config), dtype.itemsize),
        source_kv_cache_bytes_per_token=_source_cache(source.folder, dtype.itemsize),
        lambda_type=config.lambda_type,
        lambdas=layer_lambdas(config, source.read),
        growth=growth if in_masked_growth(config) else None,
    )


def _cache(shape: dict[str, Any], bytes_per_element: int) -> int:
    """Bytes per token in the KV cache of a model with these fields."""
    layers, heads, width = (shape[name] for name in ("num_hidden_layers", "num_key_value_heads", "head_dim"))
    return int(2 * layers * heads * width * bytes_per_element)


def _source_cache(folder: Path, bytes_per_element: int) -> int | None:
    path = folder / PROVENANCE_FILE
    if not path.is_file():
        return None
    try:
        return _cache(read_json(path)["source"], bytes_per_element)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ValueError(f"{path} does not describe the source of a conversion; remove it") from None
