"""LoRA (arXiv 2106.09685) by PEFT, and the plain GDA model that it results in."""

import json
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from gda.common.extras import needed_by
from gda.modeling_gda.attention_gda import HeadwiseUp
from gda.training.sharding import distributed_like, full_shape, full_tensor, unwrapped_name

if TYPE_CHECKING:
    from peft import PeftModel

# In a LoRA checkpoint beside the plain model: all trained parameters, by their names in PEFT's model.
LEARNED_FILE = "learned.safetensors"
# Prefix and adapter name of PEFT.
PEFT_PREFIX = "base_model.model."
ADAPTER = "default"
OTHER_UPDATES = re.compile(r"\.lora_(?![AB]\.default\.)|\.trainable_tokens_|\.token_adapter\.")


def with_lora(model: PreTrainedModel, rank: int, seed: int, trained: list[str]) -> "PeftModel":
    """Freeze a model and add updates of `rank`, scaled by 2, to the linear layers of its attention.

    The parameters named in `trained` are trained in full. ImportError if PEFT is not installed.
    """
    with needed_by("--train lora", "train"):
        from peft import LoraConfig, get_peft_model

    attention = [(name, each) for name, each in model.named_modules() if ".self_attn." in f".{name}"]
    targets = [name for name, module in attention if isinstance(module, nn.Linear)]
    # PEFT does not support low-rank factors per head, so they are trained in full.
    in_full = [f"{name}." for name, module in attention if isinstance(module, HeadwiseUp)]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, bias="none", task_type="CAUSAL_LM")
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks for gradient checkpointing by its old name
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config, adapter_name=ADAPTER)
    for name, parameter in adapted.named_parameters():
        plain = name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
        if plain in trained or plain.startswith(tuple(in_full)):
            parameter.requires_grad_(True)
    return adapted


def is_adapted(model: nn.Module) -> bool:
    """Whether the model is one of PEFT's. (This does not import PEFT.)"""
    return hasattr(model, "peft_config") and hasattr(model, "merge_and_unload")


def require_mergeable(model: nn.Module) -> None:
    """Raise ValueError if the model is one of PEFT's with anything but plain LoRA, named `default`.

    A checkpoint holds the plain model, with LoRA's updates added to its weights.
    """
    if not is_adapted(model):
        return
    if getattr(model, "is_quantized", False):
        raise ValueError("LoRA's updates can't be added to the quantized weights of this model; load it unquantized")
    adapters: dict[str, Any] = model.peft_config  # type: ignore[assignment]
    config = adapters.get(ADAPTER)
    is_lora = config is not None and config.peft_type == "LORA" and not config.lora_bias
    has_variant = any(getattr(module, "lora_variant", None) for module in model.modules())
    others = [name for name, _ in model.named_parameters() if OTHER_UPDATES.search(name)]
    if len(adapters) > 1 or not is_lora or has_variant or others:
        raise ValueError(
            f"the adapter {', '.join(adapters)} can't be merged into the plain model of a checkpoint; use LoRA on "
            f"linear layers, without DoRA, other variants and biases, and name it {ADAPTER}"
        )


def merged(model: "PreTrainedModel | PeftModel") -> PreTrainedModel:
    """The plain model, with LoRA's updates added to its weights. A plain model is returned as it is."""
    return model.merge_and_unload() if is_adapted(model) else model  # type: ignore[operator, return-value]


# ---------------------------------------------------------------------------------------------------------- checkpoints


def save_learned(model: nn.Module, folder: Path, *, writes: bool) -> None:
    """Save all trained parameters, and the scales of LoRA's updates, if this process `writes`.

    Training is resumed from this file. All processes must call this together.
    """
    learned = {name: full_tensor(each).cpu().contiguous() for name, each in _trained(model).items()}
    if writes:
        save_file(learned, folder / LEARNED_FILE, {"format": "pt", "scales": json.dumps(_scales(model))})


def load_learned(model: nn.Module, folder: Path) -> None:
    """Load what `save_learned` has saved; ValueError if the file is missing, or holds other parameters or scales."""
    path = folder / LEARNED_FILE
    if not path.is_file():
        raise ValueError(f"{path} is missing; a checkpoint of --train lora has one")
    trained = _trained(model)
    with safe_open(path, framework="pt") as file, torch.no_grad():
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - it cannot be iterated
        scales = json.loads((file.metadata() or {}).get("scales", "{}"))
        differing = _differing(shapes, {name: list(full_shape(each)) for name, each in trained.items()})
        differing += [f"the scale of {name}" for name in _differing(scales, _scales(model))]
        if differing:
            raise ValueError(f"{path} belongs to another run: it differs in {differing[0]}")
        for name, parameter in trained.items():
            parameter.copy_(distributed_like(parameter, file.get_tensor(name)))


def _scales(model: nn.Module) -> dict[str, float]:
    """What LoRA's updates are multiplied by (lora_alpha divided by the rank, unless PEFT was told otherwise)."""
    adapted = ((unwrapped_name(name), module) for name, module in model.named_modules() if hasattr(module, "lora_A"))
    return {name: module.scaling[ADAPTER] for name, module in adapted}


def _differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The sorted names that only one of them has, or that have another value in each."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {unwrapped_name(name): each for name, each in model.named_parameters() if each.requires_grad}
