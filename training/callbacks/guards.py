"""What watches over a run: Ctrl-C, losses that are not finite, checkpoints that must be whole, and what is shown."""

import contextlib
import math
import signal
import threading
from collections.abc import Iterator, Sized
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gda.common.screen import shows_progress
from gda.training.runs.model_folder import copy_companions
from gda.training.runs.processes import Processes
from gda.training.runs.run_folder import keep_last, mark_whole


class NotFinite(Exception):
    """Training has come to nothing: what is not finite, and where."""


class Interrupts:
    """Ctrl-C, and what a scheduler sends to take a machine back: the first asks a run to stop, the second stops it."""

    def __init__(self, console: Console | None):
        self.asked = False
        self._console = console

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Take the signals over while the block runs; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._take) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if self._console is not None and shows_progress(self._console):
            self._console.print("stopping after this step, with a checkpoint; Ctrl-C again stops at once")


class Watched(Trainer):
    """A Trainer that takes no step on a loss or a gradient that is not finite, and stops when it is asked to.

    Both are asked once a step and of all processes, so that all of them stop at the same one.
    """

    def __init__(self, *args: Any, interrupts: Interrupts, processes: Processes, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.interrupts, self.processes = interrupts, processes
        self.stopped = False
        self._losses: list[Tensor] = []

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As Trainer; keeps the loss to look at."""
        loss = super().training_step(*args, **kwargs)
        self._losses.append(loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As Trainer, which calls it between the gradients of a step and the step itself."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        loss = float(torch.stack(self._losses).sum())
        self._losses.clear()
        size = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        finite = [math.isfinite(loss), math.isfinite(size)]
        bad_loss, bad_norm, self.stopped = self.processes.any(
            [not finite[0], not finite[1], self.interrupts.asked], self.args.device
        )
        if bad_loss or bad_norm:
            what = f"the loss was {loss}" if not finite[0] else f"the norm of the gradient was {size}"
            if all(finite):
                what = "the loss or the gradient of another process was not finite"
            raise NotFinite(f"{what} at step {self.state.global_step + 1}")
        return norm


class Stops(TrainerCallback):
    """Ends a run that was asked to stop, with a checkpoint; and lets the last step be logged and not be saved.

    After the last step the model itself is written.
    """

    def __init__(self, trainer: Watched):
        self.trainer = trainer
        self.interrupted = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log, control.should_save = True, False
        elif self.trainer.stopped:
            self.interrupted = control.should_save = control.should_training_stop = True
        if control.should_save or state.global_step >= state.max_steps:
            self._require_finite(kwargs["model"], state.global_step)

    def _require_finite(self, model: nn.Module, step: int) -> None:
        """A step on finite gradients may be too long all the same; what is written is finite."""
        name = next((name for name, each in model.named_parameters() if not _is_finite(each)), None)
        (anywhere,) = self.trainer.processes.any([name is not None], self.trainer.args.device)
        if anywhere:
            raise NotFinite(f"{name or 'a parameter'} is not finite after step {step}")


def _is_finite(parameter: Tensor) -> bool:
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return bool(local.isfinite().all())


class WholeCheckpoints(TrainerCallback):
    """Makes a model's folder of each checkpoint, marks it as whole when it is, and then removes older ones.

    Args:
        folder: Where the Trainer writes.
        source: The model's folder, for tokenizer and licences.
        dtypes: By parameter, the dtype of the model before training.
        keep: How many checkpoints to keep.
        processes: All of which write into it.
    """

    def __init__(self, folder: Path, source: Path, dtypes: dict[str, str], keep: int, processes: Processes):
        self.folder, self.source, self.dtypes = folder, source, dtypes
        self.keep, self.processes = keep, processes

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        checkpoint = self.folder / f"checkpoint-{state.global_step}"

        def mark() -> None:
            copy_companions(self.source, checkpoint)
            mark_whole(checkpoint, self.dtypes)
            keep_last(self.folder, self.keep)

        self.processes.on_main(mark)  # it begins when all processes have written theirs


class Shown(TrainerCallback):
    """A bar on a terminal: steps, the last loss, and what was measured last."""

    def __init__(self, console: Console | None):
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not shows_progress(console),
            transient=True,
        )
        self._told: dict[str, str] = {}
        self._evaluating: TaskID | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._bar.start()
        self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step, told="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._bar.update(self._task, completed=state.global_step)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._evaluating is None:
            loader = kwargs.get("eval_dataloader")
            total = len(loader) if isinstance(loader, Sized) else None
            self._evaluating = self._bar.add_task("measuring", total=total, told="")
        self._bar.advance(self._evaluating)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._evaluating is not None:
            self._bar.remove_task(self._evaluating)
            self._evaluating = None

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        last = state.log_history[-1]
        for key, name in (("loss", "loss"), ("eval_loss", "measured")):
            if key in last:
                self._told[name] = f"{name} {last[key]:.4f}"
        self._bar.update(self._task, told=", ".join(self._told.values()))

    def close(self) -> None:
        """Remove the bar, however training ended."""
        self._bar.stop()


def peak_memory(device: torch.device) -> int:
    """Bytes: of the accelerator's memory, or of this process's where it trains on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
