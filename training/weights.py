"""The weights of a trained model, written as a plain model, one tensor at a time, however they are sharded."""

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from gda.conversion.options import CheckpointOptions
from gda.conversion.tensors.recipes import Recipe, copied
from gda.conversion.tensors.safetensors_io import SafetensorsReader, TensorSpec, file_order
from gda.conversion.writing.stream import shards_of, write_weights
from gda.training.lora import ADAPTER, PEFT_PREFIX, is_adapted
from gda.training.sharding import distributed_like, full_shape, full_tensor, reshard, unwrapped_name

TRAINED_COPY = f".modules_to_save.{ADAPTER}."  # beside the `original_module`, which it replaces


def plain_recipes(learner: nn.Module, dtypes: Mapping[str, torch.dtype]) -> dict[str, Recipe]:
    """How the weights of the plain model are made from the parameters of a model, or of PEFT's model around it.

    With LoRA, its updates are added to the weights. A weight that is not in `dtypes` keeps its data type.
    """
    parameters = _parameters(learner)
    adapted = ((name, module) for name, module in learner.named_modules() if hasattr(module, "lora_A"))
    scales = {unwrapped_name(name): module.scaling[ADAPTER] for name, module in adapted}
    recipes = {}
    for name, parameter in parameters.items():
        if ".lora_A." in name or ".lora_B." in name or ".original_module." in name:
            continue
        plain = name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".").replace(TRAINED_COPY, ".")
        spec = TensorSpec(full_shape(parameter), dtypes.get(plain, parameter.dtype))
        layer, _, kind = name.rpartition(".base_layer.")
        if layer and kind == "weight":
            sources = (name, *(f"{layer}.lora_{each}.{ADAPTER}.weight" for each in "AB"))
            recipes[plain] = Recipe(spec, sources, partial(_with_update, scales[layer]), "trained with LoRA")
        else:
            recipes[plain] = copied(name, spec, None)
    return recipes


def _with_update(scale: float, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return weight + scale * (up @ down)


def save_plain(
    learner: Any, folder: Path, dtypes: Mapping[str, torch.dtype] | None = None, *, writes: bool, **saving: Any
) -> None:
    """Write config.json and the weights of the plain model into `folder`, if this process `writes`.

    All processes must call this together: each tensor is gathered from all of them just before it is written. No
    process holds more than a few whole tensors.

    `learner` is the model, or PEFT's model around it. A weight that is not in `dtypes` keeps its data type. `saving`
    are arguments for `GDAConfig.save_pretrained`.
    """
    reshard(learner)
    parameters, recipes = _parameters(learner), plain_recipes(learner, dtypes or {})
    shards = shards_of(recipes, CheckpointOptions.max_shard_size)
    in_files = ({name: recipes[name].spec for name in names} for names in shards.values())
    order = iter([source for specs in in_files for name in file_order(specs) for source in recipes[name].sources])

    def gathered(name: str) -> Tensor:
        if name != next(order):
            raise RuntimeError(f"{name} is read out of order, which the other processes do not know")
        return full_tensor(parameters[name]).cpu()

    try:
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            config = copy.deepcopy(learner.config)
            model = extract_model_from_parallel(learner, keep_torch_compile=False)
            model = model.get_base_model() if is_adapted(model) else model
            config.architectures = [type(model).__name__.removeprefix("FSDP")]  # which FSDP2 puts before the name
            config.dtype = next(iter(recipes.values())).spec.dtype
            config.save_pretrained(folder, **saving)
            write_weights(folder, recipes, shards, lambda name: recipes[name](gathered))
    finally:  # also after an error, because the others wait for this process at each tensor
        for name in order:
            full_tensor(parameters[name])


@torch.no_grad()
def load_plain(learner: nn.Module, folder: Path, *, reads: bool) -> None:
    """Load what `save_plain` has written into a sharded model. One process `reads`; all must call this together."""
    reader = SafetensorsReader(folder) if reads else None
    for name, parameter in _parameters(learner).items():
        parameter.copy_(distributed_like(parameter, reader.read(name) if reader else None))


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {unwrapped_name(name): parameter for name, parameter in model.named_parameters()}
