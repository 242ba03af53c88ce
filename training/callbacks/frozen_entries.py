"""Keeps the old entries of partly trained parameters when FSDP2 replaces the parameters."""

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gda.training.sharding import distributed_like, unwrapped_name


class FrozenEntriesCallback(TrainerCallback):
    """Masks the gradients of parameters whose gradient hooks were lost because FSDP2 has replaced them.

    Args:
        new_entries: By parameter name, which entries are trained; see `partly_frozen`.
    """

    def __init__(self, new_entries: dict[str, Tensor]):
        self.new_entries = new_entries

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        parameters = {unwrapped_name(name): each for name, each in kwargs["model"].named_parameters()}
        for name, new in self.new_entries.items():
            parameter = parameters.get(name)
            if hasattr(parameter, "new_entries"):
                continue  # not replaced: its hook works
            if not isinstance(parameter, DTensor):
                raise ValueError(f"--train new cannot freeze the old part of {name} here; use FSDP2 or DDP")
            mask = distributed_like(parameter, new)
            parameter.new_entries = new  # type: ignore[attr-defined]
            parameter.register_post_accumulate_grad_hook(lambda each, mask=mask: each.grad.mul_(mask))
