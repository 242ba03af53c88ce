"""What of a model learns, and how: the parameters that move, their rates, and which of them decay."""

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gda.common.trainable import Trainable
from gda.modeling_gda.attention_gda import HeadwiseUp

if TYPE_CHECKING:
    from peft import PeftModel

LAMBDA = re.compile(r"(^|\.)lambda_(q1|k1|q2|k2|proj)(\.|$)")
NORM = re.compile(r"(^|\.)(\w*norm|subln|act_fn)(\.|$)")
BIAS = re.compile(r"(^|\.)bias$")
ATTENTION = re.compile(r"(^|\.)self_attn\.")
HEAD_NORM = re.compile(r"(^|\.)self_attn\.subln\.")
# The names that PEFT gives to what it wraps.
PEFT_PREFIX = "base_model.model."
ADAPTER = "default"


def is_lambda(name: str) -> bool:
    """Whether the parameter `name` is one that λ is made of."""
    return LAMBDA.search(name) is not None


def decays(name: str) -> bool:
    """Whether weight decay is for the parameter `name`: not for λ, norms, biases and the weights of activations."""
    return not any(pattern.search(name) for pattern in (LAMBDA, NORM, BIAS))


def choose_what_learns(
    model: PreTrainedModel, what: str, folder: str | Path, lora_rank: int, *, seed: int = 0
) -> "PreTrainedModel | PeftModel":
    """Let a part of a model learn, by `requires_grad`, and freeze the rest.

    Args:
        model: The model, in the dtype in which it is to learn.
        what: "new": what trainable.json in `folder` calls new, in a parameter that is new in part its new entries
            alone. "attention": all parameters of the attention layers, λ and the norms within among them. "all".
            "lora": updates of rank `lora_rank` of the attention's linear layers (LoRA, arXiv 2106.09685), beside them,
            whole, what could not wake new heads if it stood still: λ and the norm of heads.
        folder: Where trainable.json is.
        lora_rank: Rank of LoRA's updates, which count twice (alpha = 2 · rank).
        seed: Of LoRA's start.

    Returns:
        The model; with LoRA that which PEFT makes around it, to be made a plain one by `merged`.

    Raises:
        FileNotFoundError, ValueError: if trainable.json is absent, or tells of another model; or for a part that is
            none of these.
    """
    if what == "lora":
        return _with_lora(model, lora_rank, seed)
    if what == "new":
        _freeze_old(model, Trainable.read(folder))
    elif what in ("attention", "all"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(what == "all" or ATTENTION.search(name) is not None)
    else:
        raise ValueError(f"--train {what} is none of new, attention, all, lora")
    return model


def _freeze_old(model: PreTrainedModel, trainable: Trainable) -> None:
    if any(hasattr(parameter, "ds_shape") for parameter in model.parameters()):
        raise ValueError("--train new does not go with DeepSpeed's ZeRO-3, which hides the rows of weights; use FSDP2")
    trainable.freeze_others(model, whole=False)
    for name, parameter in model.named_parameters():
        new = trainable.new_entries(name, parameter)
        if new is not None and not bool(new.all()):
            parameter.new_entries = new  # type: ignore[attr-defined]


def partly_frozen(model: nn.Module) -> dict[str, Tensor]:
    """Of each parameter that learns in part, which entries do, as `choose_what_learns` left it."""
    return {
        name: parameter.new_entries for name, parameter in model.named_parameters() if hasattr(parameter, "new_entries")
    }


def count_learning(model: nn.Module) -> int:
    """How many weights learn; of a parameter that is new in part, the new entries."""
    partly = partly_frozen(model)
    learning = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    return sum(int(partly[name].sum()) if name in partly else parameter.numel() for name, parameter in learning)


def optimizer_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    lambda_learning_rate: float | None,
    weight_decay: float,
    never_decay: Iterable[str] = (),
) -> list[dict[str, Any]]:
    """Three groups for an optimizer, of which any may be empty: what decays, what does not, and λ, the last.

    Args:
        model: Whose parameters that require a gradient are grouped.
        learning_rate: Of the first two.
        lambda_learning_rate: Of λ; None for that of the others.
        weight_decay: Of the first. A parameter that learns in part is in the second: decay would move its old entries.
        never_decay: Names of other parameters for the second.
    """
    kept = set(never_decay) | partly_frozen(model).keys()
    groups: dict[str, list[nn.Parameter]] = {"decay": [], "keep": [], "lambda": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "lambda" if is_lambda(name) else "decay" if decays(name) and name not in kept else "keep"
            groups[kind].append(parameter)
    rate = learning_rate if lambda_learning_rate is None else lambda_learning_rate
    return [
        {"params": groups["decay"], "lr": learning_rate, "weight_decay": weight_decay},
        {"params": groups["keep"], "lr": learning_rate, "weight_decay": 0.0},
        {"params": groups["lambda"], "lr": rate, "weight_decay": 0.0},
    ]


# ----------------------------------------------------------------------------------------------------------------- LoRA


def _with_lora(model: PreTrainedModel, rank: int, seed: int) -> "PeftModel":
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ValueError("--train lora needs PEFT; pip install 'grouped-differential-attention[train]'") from None

    modules = [(name, module) for name, module in model.named_modules() if ATTENTION.search(name)]
    targets = [name for name, module in modules if isinstance(module, nn.Linear)]
    # A low-rank factor for itself, by heads, which PEFT has no form for.
    whole = [name for name, module in modules if isinstance(module, HeadwiseUp)]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, bias="none", task_type="CAUSAL_LM")
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks for gradient checkpointing by its old name
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config, adapter_name=ADAPTER)
    for name, parameter in adapted.named_parameters():
        in_whole = any(name.startswith(f"{PEFT_PREFIX}{each}.") for each in whole)
        if is_lambda(name) or HEAD_NORM.search(name) or in_whole:
            parameter.requires_grad_(True)
    return adapted


def merged(model: "PreTrainedModel | PeftModel") -> PreTrainedModel:
    """The plain model, with what LoRA has learned added to its weights; a plain model as it is."""
    return model.merge_and_unload() if is_adapted(model) else model  # type: ignore[operator, return-value]


def is_adapted(model: nn.Module) -> bool:
    """Whether PEFT has made the model. (PEFT is not imported for that.)"""
    return hasattr(model, "peft_config") and hasattr(model, "merge_and_unload")


def merged_state(model: Any, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The state dict of `merged(model)`, without changing the model.

    Args:
        model: A model of PEFT.
        state: Its state dict, if that is not to be had from it, since it is distributed.
    """
    state = model.state_dict() if state is None else state
    adapted = ((name, module) for name, module in model.named_modules() if hasattr(module, "lora_A"))
    # FSDP2 computes layers again from within a wrapper, which a state dict does not tell of.
    scales = {name.replace("_checkpoint_wrapped_module.", ""): each.scaling[ADAPTER] for name, each in adapted}
    plain = {}
    for name, tensor in state.items():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        layer, _, kind = name.rpartition(".base_layer.")
        if layer and kind == "weight":
            down, up = (state[f"{layer}.lora_{each}.{ADAPTER}.weight"] for each in "AB")
            tensor = tensor + scales[layer] * (up @ down)
        plain[name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")] = tensor
    return plain
