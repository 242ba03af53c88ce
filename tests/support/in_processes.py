"""Run by each of several CPU processes: trainings one after another, as described in JSON.

accelerate uses its settings for FSDP and DeepSpeed only if it finds GPUs. Here it is made to believe that the processes
have GPUs, with the CPU as their device, so that a configuration is in force as it would be there. Each process writes
down what it holds while it trains, for the test.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import Trainer, training_args

import gda
from gda.training import plan
from gda.training.runs import processes
from gda.training.sharding import full_shape, local_part, unwrapped_name


def pretend_gpus() -> None:
    """Let accelerate shard on the CPU."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"

    def prepare_backend(*args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    PartialState._prepare_backend = prepare_backend  # type: ignore[method-assign]
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":  # which refuses what is declared to run on the CPU
        for module in (plan, processes):
            module.on_cpu = lambda: False  # type: ignore[attr-defined]
        training_args.is_torch_bf16_gpu_available = lambda: True
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # C++ to be compiled, only for CPUs
    else:
        torch.distributed.init_process_group("gloo")


def held(trainer: Trainer) -> dict[str, Any]:
    """By parameter, the number of its entries in this process, in all, and of their two moments in this process."""
    optimizer: Any = trainer.optimizer
    partitions = getattr(getattr(optimizer, "optimizer", None), "fp32_partitioned_groups_flat", None)  # DeepSpeed's
    moments = sum(each.numel() for each in partitions) if partitions is not None else 0
    if partitions is None:
        moments = sum(local_part(state["exp_avg"]).numel() for state in optimizer.state.values())
    assert isinstance(trainer.model, torch.nn.Module)
    return {
        "parameters": {
            unwrapped_name(name): [local_part(each).numel(), torch.Size(full_shape(each)).numel()]
            for name, each in trainer.model.named_parameters()
        },
        "moments": moments,
        "dtypes": sorted({str(each.dtype) for each in trainer.model.parameters()}),
    }


def train(*, interrupt_at: int | None = None, **options: Any) -> None:
    """`gda.train`, interrupted at a step in one of the processes."""
    plain = Trainer.training_step
    interrupts = [interrupt_at] if os.environ["RANK"] == "1" else []

    def training_step(self: Trainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step + 1 in interrupts:
            interrupts.clear()  # a second one would stop at once
            os.kill(os.getpid(), signal.SIGINT)
        if self.state.global_step == 1:
            name = f"{Path(options['out']).name}-{os.environ['RANK']}.json"
            Path(os.environ["HELD"], name).write_text(json.dumps(held(self)))
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
    if "true" in (os.environ.get("ACCELERATE_USE_FSDP"), os.environ.get("ACCELERATE_USE_DEEPSPEED")):
        pretend_gpus()
    for run in json.loads(sys.argv[1]):
        AcceleratorState._reset_state()  # the settings of DeepSpeed are those of one run
        train(**run)
    processes.disconnect()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # with four processes on two cores, a thread of C++ sometimes aborts one that shuts down
