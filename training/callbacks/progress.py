"""How long training takes, its progress as lines in the log where no bar is shown, and tokens per second."""

import sys
import time
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from gda.common.numbers import exponential
from gda.common.progress import LONG_SECONDS, LoggedProgress, duration, logger, time_left


class ProgressCallback(TrainerCallback):
    """Says after two steps how long a run takes, unless it is short.

    Where the Trainer shows no bar, it also logs a line for each log entry (step, loss, learning rate, tokens per second
    and time left) and for each evaluation.
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._first_step = self._counted_from = state.global_step
        self._began = time.monotonic()  # of the counted steps, which the time of evaluations is added to
        self._step_seconds = self._evaluation_seconds = 0.0
        self._evaluation: LoggedProgress | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        now, done = time.monotonic(), state.global_step - self._first_step
        self._step_seconds = (now - self._began) / (state.global_step - self._counted_from)
        if done == 1:  # it warms up, and the others are faster
            self._began, self._counted_from = now, state.global_step
        elif done == 2 and state.is_world_process_zero:
            self._say_expected(args, state)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not args.disable_tqdm or not state.is_world_process_zero:
            return
        if self._evaluation is None:
            self._evaluation = LoggedProgress(disable=True)
            batches = kwargs["eval_dataloader"]
            total = len(batches) if has_length(batches) else None
            self._evaluation.add_task("measuring the held-out loss", total=total)
        self._evaluation.advance(self._evaluation.task_ids[0])

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if "eval_loss" in logs:
            self._evaluation_seconds, self._evaluation = logs.get("eval_runtime", 0.0), None
            self._began += self._evaluation_seconds
        if not args.disable_tqdm or not state.is_world_process_zero:
            return
        step = f"step {state.global_step:,} of {state.max_steps:,}"
        if "eval_loss" in logs:
            seconds, loss = self._evaluation_seconds, logs["eval_loss"]
            logger.info("%s: held-out loss %.4f, perplexity %.2f; %.0f s", step, loss, exponential(loss), seconds)
        elif "loss" in logs:
            speed = f", {logs['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in logs else ""
            rate, left = logs.get("learning_rate", 0.0), time_left(self._seconds_left(args, state))
            logger.info("%s: loss %.4f, rate %.2e%s, %s", step, logs["loss"], rate, speed, left)

    def _seconds_left(self, args: TrainingArguments, state: TrainerState) -> float:
        """Estimated seconds of the steps and evaluations to come."""
        steps = state.max_steps - state.global_step
        return steps * self._step_seconds + _evaluations_left(args, state) * self._evaluation_seconds

    def _say_expected(self, args: TrainingArguments, state: TrainerState) -> None:
        if (seconds := self._seconds_left(args, state)) < LONG_SECONDS:
            return
        steps, evaluations = state.max_steps - state.global_step, _evaluations_left(args, state)
        measured = f" and {evaluations} evaluation{'s' * (evaluations > 1)}" if evaluations else ""
        expected = f"the other {steps:,} steps{measured} take about {duration(seconds)}"
        if args.disable_tqdm:
            logger.info(expected)
        else:
            tqdm.write(expected, file=sys.stderr)  # above the bar


def _evaluations_left(args: TrainingArguments, state: TrainerState) -> int:
    if args.eval_strategy == "no":
        return 0
    every = int(state.eval_steps)
    return -(-state.max_steps // every) - state.global_step // every  # the last one is after the last step


class ThroughputCallback(TrainerCallback):
    """Counts steps, seconds and tokens of training steps, without evaluation, checkpoints and reading the data.

    Attributes:
        steps, seconds, tokens: Totals since the start or the last resume. `tokens` counts those of all processes.
    """

    def __init__(self) -> None:
        self._reset(0)

    def _reset(self, tokens_before: int) -> None:
        self.steps, self.seconds, self.tokens = 0, 0.0, 0
        self._tokens_before, self._reported = tokens_before, (0, 0.0, 0)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """`train` can be called again, and the state then counts from 0."""
        self._reset(int(state.num_input_tokens_seen))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.steps += 1
        self.seconds += time.perf_counter() - self._began
        self.tokens = int(state.num_input_tokens_seen) - self._tokens_before

    @property
    def tokens_per_second(self) -> float | None:
        """Over all processes; None before the first step."""
        return self.tokens / self.seconds if self.seconds else None

    def since_last_call(self) -> tuple[int, float, int]:
        """Steps, seconds and tokens since the last call."""
        now = self.steps, self.seconds, self.tokens
        steps, seconds, tokens = (here - before for here, before in zip(now, self._reported, strict=True))
        self._reported = now
        return max(int(steps), 1), seconds, int(tokens)
