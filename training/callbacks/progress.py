"""A progress bar on the terminal."""

from collections.abc import Sized
from typing import Any

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
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gda.common.screen import shows_progress


class ProgressCallback(TrainerCallback):
    """Shows the steps, the last loss and the last measurement, if the console is a terminal."""

    def __init__(self, console: Console | None):
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[losses]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not shows_progress(console),
            transient=True,
        )
        self._losses: dict[str, str] = {}
        self._evaluation: TaskID | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._bar.start()
        self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step, losses="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._bar.update(self._task, completed=state.global_step)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._evaluation is None:
            loader = kwargs.get("eval_dataloader")
            total = len(loader) if isinstance(loader, Sized) else None
            self._evaluation = self._bar.add_task("measuring", total=total, losses="")
        self._bar.advance(self._evaluation)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._evaluation is not None:
            self._bar.remove_task(self._evaluation)
            self._evaluation = None

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        last = state.log_history[-1]
        for key, name in (("loss", "loss"), ("eval_loss", "measured")):
            if key in last:
                self._losses[name] = f"{name} {last[key]:.4f}"
        self._bar.update(self._task, losses=", ".join(self._losses.values()))

    def close(self) -> None:
        """Remove the bar, however training ended."""
        self._bar.stop()
