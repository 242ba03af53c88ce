"""Run by each of several CPU processes: trainings one after another, as described in JSON.

accelerate uses its FSDP settings only if it finds GPUs; with gloo on the CPU it silently continues with DDP. Here it is
made to believe that the processes have GPUs, with the CPU as their device.
"""

import json
import os
import signal
import sys
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import Trainer

import gda


def pretend_gpus() -> None:
    """Let accelerate shard on the CPU."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    torch.distributed.init_process_group("gloo")

    def prepare_backend(*args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    PartialState._prepare_backend = prepare_backend  # type: ignore[method-assign]


def train(*, interrupt_at: int | None = None, **options: Any) -> None:
    """`gda.train`, interrupted at a step in one of the processes."""
    plain = Trainer.training_step

    def training_step(self: Trainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if os.environ["RANK"] == "1" and self.state.global_step + 1 == interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self, *args, **kwargs)

    Trainer.training_step = training_step  # type: ignore[method-assign]
    try:
        gda.train(**options)
        assert interrupt_at is None
    except KeyboardInterrupt:
        assert interrupt_at is not None
    finally:
        Trainer.training_step = plain  # type: ignore[method-assign]


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        pretend_gpus()
    for run in json.loads(sys.argv[1]):
        train(**run)
