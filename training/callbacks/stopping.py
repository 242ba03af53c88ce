"""What stops a run: Ctrl-C and SIGTERM, and values that are not finite."""

import contextlib
import math
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gda.common.errors import Interrupted
from gda.common.progress import shows_progress
from gda.training.runs.processes import Processes
from gda.training.sharding import local_part


class NotFiniteError(Exception):
    """A loss, a gradient or a parameter is not finite: which one, and at which step."""


class InterruptHandler:
    """Handles Ctrl-C and SIGTERM: the first one requests a stop, the second one raises KeyboardInterrupt.

    Slurm sends SIGTERM to all processes, and launchers pass it on. So SIGTERM counts once within two seconds.
    """

    def __init__(self, console: Console | None):
        self.requested: str | None = None  # the name of the signal
        self._console, self._at = console, 0.0

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals inside the block. Only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if number == signal.SIGTERM and time.monotonic() - self._at < 2:
                return
            raise KeyboardInterrupt
        self.requested, self._at = signal.Signals(number).name, time.monotonic()
        if self._console is not None and shows_progress(self._console):
            self._console.print("stopping after this step with a checkpoint; press Ctrl-C again to stop at once")


class StopCallback(TrainerCallback):
    """Stops a run with a checkpoint when it is interrupted, and with an error when a value is not finite.

    All processes agree on this in every step, so all stop at the same one. The last step is logged but not saved as a
    checkpoint, because the model itself is written after it.
    """

    def __init__(self, interrupts: InterruptHandler, processes: Processes):
        self.interrupts, self.processes = interrupts, processes
        self.interrupted = False  # before the last step
        self._stop_requested = False

    def check_step(self, loss: float, gradient_norm: float, step: int, device: torch.device) -> None:
        """Raise NotFiniteError if the loss or gradient of a step is not finite in any process."""
        finite = [math.isfinite(loss), math.isfinite(gradient_norm)]
        bad_loss, bad_norm, self._stop_requested = self.processes.any(
            [not finite[0], not finite[1], self.interrupts.requested is not None], device
        )
        if bad_loss or bad_norm:
            what = f"the loss was {loss}" if not finite[0] else f"the norm of the gradient was {gradient_norm}"
            if all(finite):
                what = "the loss or the gradient of another process was not finite"
            raise NotFiniteError(f"{what} at step {step}")

    def interruption(self) -> KeyboardInterrupt:
        """The error that ends an interrupted run. Several processes say which of them was asked to stop."""
        if self.processes.count == 1:
            return KeyboardInterrupt()
        asked = self.interrupts.requested and f"{self.interrupts.requested} on {socket.gethostname()}"
        return Interrupted(f"stopped by {next(filter(None, self.processes.gather(asked)))}; continue with --resume")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        is_last = state.global_step >= state.max_steps
        if is_last:
            control.should_log, control.should_save = True, False
        elif self._stop_requested:
            self.interrupted = control.should_save = control.should_training_stop = True
        if control.should_save or is_last:
            self._require_finite(kwargs["model"], state.global_step, args.device)

    def _require_finite(self, model: nn.Module, step: int, device: torch.device) -> None:
        """Refuse to save parameters that are not finite: finite gradients can still make too large a step."""
        name = next((name for name, each in model.named_parameters() if not local_part(each).isfinite().all()), None)
        (anywhere,) = self.processes.any([name is not None], device)
        if anywhere:
            raise NotFiniteError(f"{name or 'a parameter'} is not finite after step {step}")
