"""`gda` under `accelerate launch` with FSDP2 on the CPU, which accelerate has no way to ask for.

accelerate takes its FSDP settings only where it has found GPUs: with gloo on the CPU it goes on with DDP, without a
word. So it is told that its group of processes is one of GPUs, and that their device is the CPU. All else is its own.
"""

import os
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

if __name__ == "__main__":
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    torch.distributed.init_process_group("gloo")

    def prepare_backend(*args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    PartialState._prepare_backend = prepare_backend  # type: ignore[method-assign]

    from gda.cli import main

    main()
