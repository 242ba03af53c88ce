"""Fading new parts or λ in under a Trainer, step by step."""

import math
from typing import Any

from accelerate.utils import extract_model_from_parallel
from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments


class FadeCallback(TrainerCallback, ExportableState):
    """Raises the model's `fade` to 1 linearly, from the value that the model has.

    From a model at 0, optimizer step k of T = `num_steps` runs with a fade of k / T. The config says what is
    faded in:

    - `masked_signal_heads`, `masked_neurons`, `masked_layers`, `blended_layers`: masked growth (arXiv 2305.02869), as
      `gda grow --masked` begins it. At 0 the model computes what it computed before it grew.
    - `faded_head_norm`: the head norm, as `gda convert --head-norm` begins it. At 0 heads output what they did without.
    - `lambda_target`: λ, whatever its type. Layers subtract with

          λ = (1 − fade) · fade · λ_target + fade · λ_learned

      so that λ starts at 0, is shifted by at most λ_target / 4 on the way, and ends as learned. DEX (arXiv 2505.16333)
      has a schedule of this kind; the formula here is our own and may differ from that paper's.

    From step T on, the model is an ordinary one, and a model saved then has none of these fields. Evaluation runs with
    the fade of its step, a checkpoint's config.json records it, and the best model, if it is loaded at the end, gets
    the fade that it had. Resuming from a checkpoint continues the schedule.

    Args:
        num_steps: T, in optimizer steps.
        lambda_target: Shift λ towards this value while it fades in. Default: the model's own target, if it has one.

    Raises:
        ValueError: if `num_steps` is below 1 or the target is not finite; and when training begins, if nothing is to
            fade in, if the model is already fading in with another target, or if the checkpoint's schedule differs.

    Example:
        >>> from transformers import Trainer
        >>> fade = FadeCallback(num_steps=1000, lambda_target=0.2)
        >>> trainer = Trainer(model, arguments, train_dataset=data, callbacks=[fade])
    """

    def __init__(self, num_steps: int, lambda_target: float | None = None):
        if num_steps < 1:
            raise ValueError(f"FadeCallback needs num_steps of at least 1, not {num_steps}")
        if lambda_target is not None and not math.isfinite(lambda_target):
            raise ValueError(f"FadeCallback needs a lambda_target that is finite, not {lambda_target}")
        self.num_steps = num_steps
        self.lambda_target = lambda_target
        self.first_step = 0
        self.first_value: float | None = None

    def value(self, step: int) -> float:
        """The fade of optimizer step `step`, counted over the whole training."""
        assert self.first_value is not None  # set when training begins
        done = min(1.0, max(0.0, (step - self.first_step) / self.num_steps))
        return self.first_value + (1.0 - self.first_value) * done

    def state(self) -> dict[str, dict[str, Any]]:
        """The schedule, as a checkpoint stores it."""
        return {
            "args": {"num_steps": self.num_steps, "lambda_target": self.lambda_target},
            "attributes": {"first_step": self.first_step, "first_value": self.first_value},
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Continue the checkpoint's schedule, or start one."""
        model = _model(kwargs)
        if not self._continue_schedule(state):
            self._prepare(model)
            self.first_step, self.first_value = state.global_step, model.config.fade
        elif self.value(state.global_step) < 1:
            self._prepare(model)
        # The Trainer reads our state from here when it saves, even if the checkpoint that it resumed from had none.
        _saved_callbacks(state)[type(self).__name__] = self.state()
        self._set_fade(model, state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise the fade for the coming step."""
        self._set_fade(_model(kwargs), state.global_step + 1)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the best model, if the Trainer has loaded it, the fade that it had."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None and state.best_global_step:
            self._set_fade(_model(kwargs), state.best_global_step)

    def _continue_schedule(self, state: TrainerState) -> bool:
        """Take the schedule from the checkpoint that the Trainer resumes from; False if there is none."""
        saved = _saved_callbacks(state).get(type(self).__name__)
        if state.global_step == 0 or saved is None or saved["attributes"]["first_value"] is None:
            return False
        for name, value in self.state()["args"].items():
            if (before := saved["args"][name]) != value:
                raise ValueError(
                    f"FadeCallback({name}={value}): the checkpoint was made with {before}, and the fade would jump; "
                    f"pass {name}={before}"
                )
        for name, value in saved["attributes"].items():
            setattr(self, name, value)
        return True

    def _prepare(self, model: Any) -> None:
        """Make sure that there is something to fade in."""
        config = model.config
        if self.lambda_target is None:
            if config.fade is None:
                raise ValueError(
                    "FadeCallback: the model has no fade, so there is nothing to fade in; grow it with "
                    "`gda grow --masked`, or pass lambda_target"
                )
        elif config.fade and config.lambda_target != self.lambda_target:
            raise ValueError(
                f"FadeCallback(lambda_target={self.lambda_target}): the model is fading in with another target, and "
                f"its λ would jump; pass lambda_target={config.lambda_target}"
            )
        else:
            model.set_fade(config.fade or 0.0, lambda_target=self.lambda_target)

    def _set_fade(self, model: Any, step: int) -> None:
        # A model that was saved at 1 has no fade: it is an ordinary one.
        if model.config.fade not in (None, self.value(step)):
            model.set_fade(self.value(step))


def _saved_callbacks(state: TrainerState) -> dict[str, Any]:
    """The states of callbacks in a checkpoint, by class name."""
    assert isinstance(state.stateful_callbacks, dict)  # TrainerState makes it one
    return state.stateful_callbacks


def _model(kwargs: dict[str, Any]) -> Any:
    """The model that the Trainer trains, unwrapped; an adapter of PEFT passes calls on by itself."""
    return extract_model_from_parallel(kwargs["model"])
