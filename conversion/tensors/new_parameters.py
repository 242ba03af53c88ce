"""The content of trainable.json: which parameters of a model are new, by the features that their axes count."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from gda.common.trainable import NewParameters, Trainable, slices
from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.tensors.axes import LAYER, axes_of
from gda.conversion.tensors.recipes import meta_model


def describe_new(
    config: GDAConfig, names: Iterable[str], *, kept: Mapping[str, Tensor], new: Collection[str] = ()
) -> Trainable:
    """Describe the new parameters of a model.

    `kept` says which features are not new, as booleans, by kind of feature; kinds that are absent have no new ones.
    `new` are patterns of the names of parameters that are new as a whole.
    """
    parameters = [NewParameters(pattern, None) for pattern in new]
    for name in names:
        if any(re.fullmatch(pattern, name) for pattern in new):
            continue
        axes = [":" if kind is None or kind not in kept else slices(kept[kind].tolist()) for kind in axes_of(name)]
        partly_new = NewParameters(_in_every_layer(name), axes)
        if any(axis != ":" for axis in axes) and partly_new not in parameters:
            parameters.append(partly_new)
    described = Trainable(parameters, {})
    return replace(described, peft=_peft_arguments(config, described))


def _in_every_layer(name: str) -> str:
    """A pattern that matches the parameter `name` in its layer and in every other layer."""
    if (match := LAYER.fullmatch(name)) is None:
        return re.escape(name)
    return rf"model\.layers\.\d+\.{re.escape(match.group(2))}"


def _peft_arguments(config: GDAConfig, new: Trainable) -> dict[str, Any]:
    """The modules with new parameters: those that LoRA can adapt, and those that it can only train and save whole."""
    adapted: list[str] = []
    saved: list[str] = []
    for name, module in meta_model(config).named_modules():
        own = [f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)]
        tied = config.tie_word_embeddings and name in ("model.embed_tokens", "lm_head")
        if tied or name.endswith("self_attn") or not any(new.holds(parameter) for parameter in own):
            continue
        (adapted if isinstance(module, nn.Linear) and name != "lm_head" else saved).append(name)
    return {"target_modules": adapted, "modules_to_save": saved}
