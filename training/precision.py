"""What is computed in which dtype where a launcher and a sharded model have a say in it."""

import os

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import MixedPrecisionPolicy


def launcher_wants_bfloat16() -> bool:
    """Whether `accelerate launch`, or its configuration, asks for bfloat16."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no") == "bf16"


def keep_sums_wide(accelerator: Accelerator) -> None:
    """Let FSDP2 add up gradients in float32, and leave the loss as it is, where it multiplies in bfloat16.

    accelerate's policy rounds both to bfloat16: a loss of 4.74 is then told as 4.75, and the gradients of many
    processes lose what is small in them. Parameters, λ's among them, are rounded to bfloat16 for the computation
    alone; what learns is float32.
    """
    if accelerator.is_fsdp2 and accelerator.mixed_precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=None)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
