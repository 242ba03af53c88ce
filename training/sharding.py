"""Parameters and names of models that are wrapped or sharded."""

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

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
