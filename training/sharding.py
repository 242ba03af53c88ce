"""Parameters of models that are wrapped or sharded over processes."""

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# What torch.compile, FSDP2's activation checkpointing and DDP put before the names of parameters.
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "module.")


def unwrapped_name(name: str) -> str:
    """The name of a parameter without the wrappers around its modules."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor. All processes must call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def distributed_like(parameter: Tensor, full: Tensor) -> Tensor:
    """`full`, sharded as the parameter is."""
    if isinstance(parameter, DTensor):
        device = parameter.to_local().device
        return distribute_tensor(full.to(device), parameter.device_mesh, parameter.placements)
    return full


class FrozenEntriesCallback(TrainerCallback):
    """Keeps the old entries of partly trained parameters where FSDP2 replaces parameters and drops their hooks.

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
