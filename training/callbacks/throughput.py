"""Tokens per second."""

import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ThroughputCallback(TrainerCallback):
    """Counts steps, seconds and tokens of training steps, without evaluation, checkpoints and reading the data.

    Attributes:
        steps, seconds, tokens: Totals since the start or the last resume. `tokens` counts those of all processes.
    """

    def __init__(self) -> None:
        self.steps, self.seconds, self.tokens = 0, 0.0, 0
        self._tokens_before: int | None = None
        self._reported = (0, 0.0, 0)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._tokens_before is None:
            self._tokens_before = int(state.num_input_tokens_seen)
        self._began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.steps += 1
        self.seconds += time.perf_counter() - self._began
        self.tokens = int(state.num_input_tokens_seen) - (self._tokens_before or 0)

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
