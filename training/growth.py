"""Masked growth under a Trainer: the mask rises from step to step (arXiv 2305.02869)."""

from typing import Any

from accelerate.utils import extract_model_from_parallel
from transformers import PreTrainedModel
from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments


class GrowthMaskCallback(TrainerCallback, ExportableState):
    """Raises the mask of new heads, neurons and layers in a straight line, from where the model has it to 1.

    Optimizer step k of `num_steps` runs, from a model at 0, with a mask of k / num_steps: the last one runs with whole
    new parts, and the model then saved has no mask any more. A checkpoint on the way says in its config.json how far it
    has come. Resuming from it goes on with the same schedule, whether the model was made anew or read from it; and the
    best model, if it is loaded at the end, gets the mask that it had.

    Args:
        num_steps: Optimizer steps until the mask is 1.

    Raises:
        ValueError: if `num_steps` is below 1; and when training begins, if nothing of the model is masked, or if it is
            resumed with another number of steps than it was begun with.

    Example:
        >>> from transformers import Trainer
        >>> trainer = Trainer(model, arguments, train_dataset=data, callbacks=[GrowthMaskCallback(num_steps=1000)])
    """

    def __init__(self, num_steps: int):
        if num_steps < 1:
            raise ValueError(f"GrowthMaskCallback needs num_steps of at least 1, not {num_steps}")
        self.num_steps = num_steps
        self.first_step = 0
        self.first_value: float | None = None

    def value(self, step: int) -> float:
        """The mask after `step` optimizer steps, counted over the whole training."""
        assert self.first_value is not None  # set when training begins
        done = min(1.0, max(0.0, (step - self.first_step) / self.num_steps))
        return self.first_value + (1.0 - self.first_value) * done

    def state(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint keeps of the schedule."""
        attributes = {"first_step": self.first_step, "first_value": self.first_value}
        return {"args": {"num_steps": self.num_steps}, "attributes": attributes}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the schedule up where the checkpoint left it, or start one."""
        model = _model_of(kwargs)
        if not self._resumed(state):
            self.first_step, self.first_value = state.global_step, model.config.growth_mask
        if self.first_value is None or (model.config.growth_mask is None and self.value(state.global_step) < 1):
            raise ValueError(
                "GrowthMaskCallback: the model has no growth_mask, so there is nothing to raise; "
                "`gda grow --masked` makes a model that has one"
            )
        # The Trainer looks ours up in it when it saves, also if the checkpoint that it resumes from was without.
        _saved_in(state)[type(self).__name__] = self.state()
        self._set(model, state.global_step)

    def _resumed(self, state: TrainerState) -> bool:
        """Whether the Trainer goes on from a checkpoint that has a schedule, which then is taken."""
        saved = _saved_in(state).get(type(self).__name__)
        if state.global_step == 0 or saved is None or saved["attributes"]["first_value"] is None:
            return False
        if (num_steps := saved["args"]["num_steps"]) != self.num_steps:
            raise ValueError(
                f"GrowthMaskCallback(num_steps={self.num_steps}): the checkpoint was made with {num_steps}, and the "
                f"mask would jump; pass num_steps={num_steps}"
            )
        for name, value in saved["attributes"].items():
            setattr(self, name, value)
        return True

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise the mask for the step to come."""
        self._set(_model_of(kwargs), state.global_step + 1)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the best model the mask that it had, if the Trainer has loaded it."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None and state.best_global_step:
            self._set(_model_of(kwargs), state.best_global_step)

    def _set(self, model: PreTrainedModel, step: int) -> None:
        # It is None where a checkpoint at 1 was read, which is a model like any other.
        if model.config.growth_mask not in (None, self.value(step)):
            model.set_growth_mask(self.value(step))  # type: ignore[operator]


def _saved_in(state: TrainerState) -> dict[str, Any]:
    """The states of callbacks that a checkpoint has or will have, by their classes."""
    assert isinstance(state.stateful_callbacks, dict)  # made so by TrainerState
    return state.stateful_callbacks


def _model_of(kwargs: dict[str, Any]) -> Any:
    """The model that the Trainer trains, out of what surrounds it; an adapter of PEFT hands calls on by itself."""
    return extract_model_from_parallel(kwargs["model"])
