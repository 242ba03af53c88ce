"""Progress of training as lines in the log, where no bar is shown."""

import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gda.common.numbers import exponential
from gda.common.progress import logger, time_left


class ProgressCallback(TrainerCallback):
    """Logs a line for each log entry and each evaluation: step, loss, learning rate, tokens per second, time left."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._began, self._first_step = time.monotonic(), state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        step = f"step {state.global_step:,} of {state.max_steps:,}"
        if "eval_loss" in logs:
            seconds, loss = logs.get("eval_runtime", 0.0), logs["eval_loss"]
            logger.info("%s: held-out loss %.4f, perplexity %.2f; %.0f s", step, loss, exponential(loss), seconds)
        elif "loss" in logs:
            done = state.global_step - self._first_step
            left = (time.monotonic() - self._began) / max(1, done) * (state.max_steps - state.global_step)
            speed = f", {logs['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in logs else ""
            rate = logs.get("learning_rate", 0.0)
            logger.info("%s: loss %.4f, rate %.2e%s, %s", step, logs["loss"], rate, speed, time_left(left))
