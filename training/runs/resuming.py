"""What a run goes on from, read with care: a damaged checkpoint is an error of one line, and none is trained on."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from gda.common.errors import first_line
from gda.training.runs.run_folder import step_of


@contextlib.contextmanager
def gone_on_from(checkpoint: str | Path | None) -> Iterator[None]:
    """Say in one line what stops the reading of a checkpoint; torch says it in many, and by any kind of error.

    Raises:
        ValueError: naming the checkpoint.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"--resume: {checkpoint} is damaged ({first_line(error)}); remove it to go on from the one "
            "before it, or --overwrite begins anew"
        ) from None


def require_state(checkpoint: Path) -> None:
    """Refuse a checkpoint whose trainer_state.json is not one of its step.

    Raises:
        ValueError: naming the checkpoint.
    """
    with gone_on_from(checkpoint):
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if state.global_step != step_of(checkpoint) or not _is_whole(state):
            raise ValueError(f"{TRAINER_STATE_NAME} is not that of step {step_of(checkpoint)}")


def _is_whole(state: TrainerState) -> bool:
    numbers = (state.epoch, state.max_steps, state.num_input_tokens_seen, state.total_flos)
    losses = [
        entry.get(name, 0.0) if isinstance(entry, dict) else None
        for entry in (state.log_history if isinstance(state.log_history, list) else [None])
        for name in ("loss", "step")
    ]
    return all(map(_is_number, (*numbers, *losses))) and isinstance(state.stateful_callbacks, dict)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class Resumed(Trainer):
    """A Trainer that names the checkpoint which it cannot read."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *arguments: Any, **kwargs: Any) -> None:
        with gone_on_from(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *arguments, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with gone_on_from(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with gone_on_from(checkpoint):
            super()._load_rng_state(checkpoint)
