"""Which parameters of a model are trained, at which rates, and which of them decay."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from gda.common.trainable import Trainable
from gda.training.lora import with_lora

if TYPE_CHECKING:
    from peft import PeftModel

LAMBDA = re.compile(r"(^|\.)lambda_(q1|k1|q2|k2|proj)(\.|$)")
NORM = re.compile(r"(^|\.)(\w*norm|subln|act_fn)(\.|$)")
BIAS = re.compile(r"(^|\.)bias$")
ATTENTION = re.compile(r"(^|\.)self_attn\.")
HEAD_NORM = re.compile(r"(^|\.)self_attn\.subln\.")


def is_lambda(name: str) -> bool:
    """Whether λ is computed from the parameter `name`."""
    return LAMBDA.search(name) is not None


def decays(name: str) -> bool:
    """Whether weight decay applies to the parameter `name`: not to λ, norms, biases and weights of activations."""
    return not any(pattern.search(name) for pattern in (LAMBDA, NORM, BIAS))


def choose_what_learns(
    model: PreTrainedModel, what: str, folder: str | Path, lora_rank: int, *, seed: int = 0
) -> "PreTrainedModel | PeftModel":
    """Set `requires_grad` of all parameters, so that a part of the model is trained and the rest is frozen.

    Args:
        model: The model, in the data type in which it is trained.
        what: "new": what trainable.json in `folder` lists; of a partly new parameter, only the new entries.
            "attention": all parameters of the attention layers, with λ and the norms in them. "all": everything.
            "lora": low-rank updates of the attention's linear layers. λ and the head norms are trained in full, because
            new heads would have no effect with a λ that stays 0.
        folder: Folder of trainable.json.
        lora_rank: Rank of LoRA's updates.
        seed: Seed of LoRA's initialization.

    Returns:
        The model; with LoRA, PEFT's model around it, which `merged` makes plain again.

    Raises:
        FileNotFoundError: if trainable.json is needed and missing.
        ValueError: for an unknown `what`; if trainable.json does not fit the model; if an earlier call with "new" has
            frozen a part of a parameter, and `what` is not "new".
        ImportError: if PEFT is needed and missing.
    """
    names = [name for name, _ in model.named_parameters()]
    if what != "new" and (partly := partly_frozen(model)):
        raise ValueError(f"--train {what}: the old part of {next(iter(partly))} is frozen; load the model again")
    if what == "lora":
        return with_lora(model, lora_rank, seed, [name for name in names if is_lambda(name) or HEAD_NORM.search(name)])
    if what == "new":
        Trainable.read(folder).freeze_others(model)
    elif what in ("attention", "all"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(what == "all" or ATTENTION.search(name) is not None)
    else:
        raise ValueError(f"--train {what} is not one of new, attention, all, lora")
    return model


def partly_frozen(model: nn.Module) -> dict[str, Tensor]:
    """By name of each partly trained parameter, which of its entries `choose_what_learns` has left trainable."""
    return {
        name: parameter.new_entries for name, parameter in model.named_parameters() if hasattr(parameter, "new_entries")
    }


def count_learning(model: nn.Module) -> int:
    """Number of trained weights. Of a partly trained parameter, only the new entries count."""
    learning = (each for each in model.parameters() if each.requires_grad)
    return sum(int(each.new_entries.sum()) if hasattr(each, "new_entries") else each.numel() for each in learning)


def optimizer_groups(
    model: nn.Module, *, learning_rate: float, lambda_learning_rate: float | None, weight_decay: float
) -> list[dict[str, Any]]:
    """Three parameter groups for an optimizer: with weight decay, without, and λ last. Any of them may be empty.

    Partly trained parameters do not decay, because decay would change their old entries.

    Args:
        model: Its parameters that require a gradient are grouped.
        learning_rate: Learning rate of the first two groups.
        lambda_learning_rate: Learning rate of λ; None for the same one.
        weight_decay: Weight decay of the first group.
    """
    kept = partly_frozen(model).keys()
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
