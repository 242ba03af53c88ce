"""Run by each process of a launch: `gda train`, with a fault before a step of one process.

Arguments: a list of faults as JSON, one for each start by torchrun, then the arguments of gda.
"""

import json
import os
import signal
import sys
import time
from typing import Any

import torch
from transformers import Trainer

from gda.cli import main
from gda.training.runs import watch


def inject(signal_name: str, process: int, step: int, whom: str) -> None:
    """Send a signal to this process, its launcher, or both, which are a machine."""
    plain = Trainer.training_step
    launcher, itself = os.getppid(), os.getpid()

    def training_step(self: Trainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if int(os.environ["RANK"]) == process and self.state.global_step + 1 == step:
            for each in {"launcher": [launcher], "machine": [launcher, itself], "process": [itself]}[whom]:
                os.kill(each, signal.Signals[signal_name])
            time.sleep(3)  # the launcher passes the signal on
        return plain(self, *args, **kwargs)

    Trainer.training_step = training_step  # type: ignore[method-assign]


if __name__ == "__main__":
    watch.MISSED = 4  # beats
    faults = json.loads(sys.argv.pop(1))
    start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if start < len(faults):
        inject(*faults[start])
    main()
