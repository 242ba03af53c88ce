"""Training with a fade: arguments of a short run, a callback that records the fade, and one that stops the run."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from gda.training import FadeCallback


def trainer_arguments(folder: Path, **options: Any) -> TrainingArguments:
    """Arguments of a short run on the CPU that logs and saves nothing by default."""
    plain: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 3,
    }
    return TrainingArguments(output_dir=str(folder), **plain | options)


class Recorder(FadeCallback):
    """Records the fade of each step."""

    def __init__(self, num_steps: int, lambda_target: float | None = None):
        super().__init__(num_steps, lambda_target)
        self.seen: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_begin(args, state, control, **kwargs)
        self.seen.append(kwargs["model"].config.fade)


class StopAt(TrainerCallback):
    """Stops training after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step
