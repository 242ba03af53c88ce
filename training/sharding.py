"""Parameters of models that are wrapped or sharded over processes."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gda.training.runs.processes import reported_elsewhere

# What torch.compile, FSDP2's activation checkpointing and DDP put before the names of parameters.
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "module")

NEW_WITH_DEEPSPEED = "--train new does not work with DeepSpeed, which has its own gradients; use FSDP2"


@contextlib.contextmanager
def first_failure() -> Iterator[None]:
    """Raise the error of one process instead of torch's collection of them, which is not even an Exception.

    All processes get the same collection. In the others, the error is marked as reported elsewhere.
    """
    try:
        yield
    except CheckpointException as error:
        rank, (first, _) = next(iter(error.failures.items()))
        is_own = not torch.distributed.is_initialized() or rank == torch.distributed.get_rank()
        raise first if is_own else reported_elsewhere(first) from None


def unwrapped_name(name: str) -> str:
    """The name of a parameter without the wrappers around its modules."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def full_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a tensor that may be sharded."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


@torch.no_grad()
def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that FSDP2 or ZeRO-3 may have sharded. All processes must call this together."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.detach()


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else getattr(tensor, "ds_tensor", tensor)


def distributed_like(parameter: Tensor, full: Tensor | None) -> Tensor:
    """`full`, sharded as the parameter is. Of a sharded parameter, only the first process needs `full`."""
    if isinstance(parameter, DTensor):
        device = parameter.to_local().device
        full = torch.empty(parameter.shape, dtype=parameter.dtype) if full is None else full
        return distribute_tensor(full.to(device), parameter.device_mesh, parameter.placements)
    assert full is not None
    return full


def reshard(model: nn.Module) -> None:
    """Shard again what FSDP2 keeps whole between a forward and a backward pass; after an evaluation, none follows."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class FrozenEntriesCallback(TrainerCallback):
    """Keeps the old entries of partly trained parameters where FSDP2 replaces parameters and drops their hooks.

    `new_entries` are those of `partly_frozen`.
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
