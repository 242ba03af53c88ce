"""What of a model is new, by the features that its tensors count: the content of trainable.json."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gda.common.trainable import NewParameters, Trainable, slices
from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.tensors.axes import LAYER, axes_of, sizes
from gda.conversion.tensors.recipes import checkpoint_specs, meta_model

LAMBDA = r"model\.layers\.\d+\.self_attn\.lambda_.+"
SOLVED = r"model\.layers\.\d+\.self_attn\.o_proj\.weight"


def trainable(
    config: GDAConfig, names: Iterable[str], *, kept: Mapping[str, Tensor], whole: Iterable[str] = ()
) -> Trainable:
    """What is new in a model.

    Args:
        config: Its config.
        names: Its tensors.
        kept: Which features are not new, as booleans, for each kind of feature that the axes of a tensor count.
        whole: Patterns of the names of parameters that are new as a whole.
    """
    parameters = [NewParameters(pattern, None) for pattern in whole]
    for name in names:
        of_axes = [":" if kind is None else slices(kept[kind].tolist()) for kind in axes_of(name)]
        told = NewParameters(_in_any_layer(name), of_axes)
        if any(each != ":" for each in of_axes) and told not in parameters:
            parameters.append(told)
    unfinished = Trainable(parameters, {})
    return replace(unfinished, peft=_for_peft(config, unfinished))


def new_by_conversion(config: GDAConfig, *, mode: str) -> Trainable | None:
    """What a conversion has added to its source: noise queries and λ; None if it has added nothing.

    Of a split, whose noise queries are the source's in another role, also the output projections, which were solved
    anew.
    """
    if mode == "map":
        return None
    whole = [LAMBDA, SOLVED] if mode == "split" else [LAMBDA]
    kept = {kind: torch.ones(size, dtype=torch.bool) for kind, size in sizes(config).items()}
    is_signal = torch.ones(config.num_noise_heads, config.signal_noise_ratio + 1, dtype=torch.bool)
    is_signal[:, -1] = False
    for kind in ("query", "query rank"):
        kept[kind] = is_signal.flatten().repeat_interleave(sizes(config)[kind] // config.num_attention_heads)
    return trainable(config, checkpoint_specs(config), kept=kept, whole=whole)


def _in_any_layer(name: str) -> str:
    """A pattern for a parameter in the layer of `name` and every other."""
    if (match := LAYER.fullmatch(name)) is None:
        return re.escape(name)
    return rf"model\.layers\.\d+\.{re.escape(match.group(2))}"


def _for_peft(config: GDAConfig, new: Trainable) -> dict[str, Any]:
    """Modules that hold something new: those that LoRA adapts, and those that it can only save as they are trained."""
    adapted: list[str] = []
    saved: list[str] = []
    for name, module in meta_model(config).named_modules():
        own = [f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)]
        tied = config.tie_word_embeddings and name in ("model.embed_tokens", "lm_head")
        if tied or name.endswith("self_attn") or not any(new.holds(parameter) for parameter in own):
            continue
        (adapted if isinstance(module, nn.Linear) and name != "lm_head" else saved).append(name)
    return {"target_modules": adapted, "modules_to_save": saved}
