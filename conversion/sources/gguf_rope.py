"""RoPE scaling in a GGUF file, as llama.cpp reads it (src/llama-model.cpp).

Linear scaling and YaRN are in the metadata. The scaling of Llama 3.1 to 3.3 is a tensor, `rope_freqs.weight`, by which
each frequency is divided.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gda.conversion.families.llamalike import head_dim

ROPE_FREQS = "rope_freqs.weight"
KEY = "rope.scaling."
READ_KEYS = tuple(f"{KEY}{name}" for name in ("type", "factor", "original_context_length", "finetuned"))
# Other entries, with their values in YaRN. llama.cpp's Llama ignores other betas, and transformers would not.
DEFAULTS = {f"{KEY}yarn_beta_fast": 32.0, f"{KEY}yarn_beta_slow": 1.0}
# How far the formula of llama3 may be from a tensor: both are computed in float32.
TOLERANCE = 1e-6


def scaling_in_metadata(keys: list[str], metadata: Callable[[str], Any], context: int) -> dict[str, Any]:
    """The parameters of RoPE besides its base, for entries `keys` of a file; `context` is its context length.

    As in llama.cpp, a factor without a type is linear scaling, and YaRN's original length is the context by default.

    Raises:
        TypeError, ValueError: naming the entry that has no counterpart in transformers, or no sense.
    """
    kind = metadata(f"{KEY}type") or "linear"
    factor = float(metadata(f"{KEY}factor") or metadata("rope.scale_linear") or 1)
    length = int(metadata(f"{KEY}original_context_length") or context)
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"{KEY}type is {kind!r}, which cannot be read; these can: none, linear, yarn")
    if not 0 < factor < math.inf or length < 1:
        raise ValueError(f"{KEY}factor is {factor} and the original context length {length}: both must be positive")
    for key in keys:
        if key.startswith(KEY) and key not in READ_KEYS and metadata(key) != DEFAULTS.get(key, 1.0):
            raise ValueError(f"{key} is {metadata(key)!r:.20}, which has no counterpart in transformers")
    if kind == "none" or factor == 1:
        return {}
    scaling = {"rope_type": kind, "factor": factor}
    return scaling if kind == "linear" else scaling | {"original_max_position_embeddings": length}


def scaling_in_tensor(config: Any, factors: Tensor) -> dict[str, Any]:
    """The parameters of llama3's RoPE that divides the frequencies of `config` by `factors` (head_dim / 2).

    llama3 divides low frequencies by `factor` and high ones by 1. Between them, 1 / factors is linear in the frequency:
    it depends on two numbers, so that low_freq_factor can be taken as 1.

    Raises:
        ValueError: if it computes other factors.
    """
    if torch.equal(factors, torch.ones_like(factors)):
        return {}
    largest = factors.max().double()
    between = (factors > 1 + TOLERANCE) & (factors < largest * (1 - TOLERANCE))
    if factors.shape == (head_dim(config) // 2,) and between.sum() > 1:
        turns = _frequencies(config)[between].double() / (2 * torch.pi)  # per token
        smooth = (1 / factors[between].double() - 1 / largest) / (1 - 1 / largest)
        slope, offset = torch.linalg.lstsq(torch.stack([turns, torch.ones_like(turns)], dim=1), smooth).solution
        high = round((1 - 1 / offset).item(), 3)
        scaling = {
            "rope_type": "llama3",
            "factor": round(largest.item(), 3),
            "low_freq_factor": 1.0,
            "high_freq_factor": high,
            "original_max_position_embeddings": round(slope.item() * (high - 1)),
        }
        scaled = copy.copy(config)
        scaled.rope_parameters = config.rope_parameters | scaling
        if high > 1 and torch.allclose(rope_factors(scaled), factors, rtol=TOLERANCE, atol=0):
            return scaling
    raise ValueError(f"{ROPE_FREQS} is not what llama3's RoPE scaling computes, the only one that can be read")


def rope_factors(config: PreTrainedConfig) -> Tensor:
    """The factors (head_dim / 2) by which llama3's RoPE of `config` divides its frequencies."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    return _frequencies(config) / scaled


def _frequencies(config: Any) -> Tensor:
    """RoPE's frequencies (head_dim / 2), in radians per token, without scaling."""
    return 1.0 / config.rope_parameters["rope_theta"] ** (
        torch.arange(0, head_dim(config), 2).float() / head_dim(config)
    )
