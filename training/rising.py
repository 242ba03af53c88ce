"""What rises while a model is trained, from step to step of a Trainer, and is kept in its config on the way."""

from abc import abstractmethod
from typing import Any

from accelerate.utils import extract_model_from_parallel
from transformers import PreTrainedModel
from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments


class RisingCallback(TrainerCallback, ExportableState):
    """Raises a value of the model in a straight line, from where the model has it to 1.

    Optimizer step k of `num_steps` runs, from a model at 0, with k / num_steps. A checkpoint on the way says in its
    config.json how far it has come. Resuming from it goes on with the same schedule, whether the model was made anew or
    read from it; and the best model, if it is loaded at the end, gets the value that it had.

    Args:
        num_steps: Optimizer steps until the value is 1.

    Raises:
        ValueError: if `num_steps` is below 1; and when training begins, if it is resumed with another schedule than it
            was begun with.
    """

    def __init__(self, num_steps: int):
        if num_steps < 1:
            raise ValueError(f"{type(self).__name__} needs num_steps of at least 1, not {num_steps}")
        self.num_steps = num_steps
        self.first_step = 0
        self.first_value: float | None = None

    @abstractmethod
    def current(self, model: PreTrainedModel) -> float | None:
        """The value of the model; None where it has none, as a model that has come to its end."""

    @abstractmethod
    def assign(self, model: PreTrainedModel, value: float) -> None:
        """Give it to the model."""

    @abstractmethod
    def ready(self, model: PreTrainedModel) -> None:
        """Make sure that the model has a value to raise.

        Raises:
            ValueError: if it cannot have one.
        """

    def arguments(self) -> dict[str, Any]:
        """Those that it was made with, by which a resumed training is recognised."""
        return {"num_steps": self.num_steps}

    def value(self, step: int) -> float:
        """The value in optimizer step `step`, counted over the whole training."""
        assert self.first_value is not None  # set when training begins
        done = min(1.0, max(0.0, (step - self.first_step) / self.num_steps))
        return self.first_value + (1.0 - self.first_value) * done

    def state(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint keeps of the schedule."""
        attributes = {"first_step": self.first_step, "first_value": self.first_value}
        return {"args": self.arguments(), "attributes": attributes}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the schedule up where the checkpoint left it, or start one."""
        model = _model_of(kwargs)
        if not self._resumed(state):
            self.ready(model)
            self.first_step, self.first_value = state.global_step, self.current(model)
        elif self.value(state.global_step) < 1:
            self.ready(model)
        # The Trainer looks ours up in it when it saves, also if the checkpoint that it resumes from was without.
        _saved_in(state)[type(self).__name__] = self.state()
        self._set(model, state.global_step)

    def _resumed(self, state: TrainerState) -> bool:
        """Whether the Trainer goes on from a checkpoint that has a schedule, which then is taken."""
        saved = _saved_in(state).get(type(self).__name__)
        if state.global_step == 0 or saved is None or saved["attributes"]["first_value"] is None:
            return False
        for name, value in self.arguments().items():
            if (before := saved["args"][name]) != value:
                raise ValueError(
                    f"{type(self).__name__}({name}={value}): the checkpoint was made with {before}, and what it has "
                    f"raised would jump; pass {name}={before}"
                )
        for name, value in saved["attributes"].items():
            setattr(self, name, value)
        return True

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise the value for the step to come."""
        self._set(_model_of(kwargs), state.global_step + 1)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the best model the value that it had, if the Trainer has loaded it."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None and state.best_global_step:
            self._set(_model_of(kwargs), state.best_global_step)

    def _set(self, model: PreTrainedModel, step: int) -> None:
        # It is None where a checkpoint at 1 was read, which is a model like any other.
        if self.current(model) not in (None, self.value(step)):
            self.assign(model, self.value(step))


def _saved_in(state: TrainerState) -> dict[str, Any]:
    """The states of callbacks that a checkpoint has or will have, by their classes."""
    assert isinstance(state.stateful_callbacks, dict)  # made so by TrainerState
    return state.stateful_callbacks


def _model_of(kwargs: dict[str, Any]) -> Any:
    """The model that the Trainer trains, out of what surrounds it; an adapter of PEFT hands calls on by itself."""
    return extract_model_from_parallel(kwargs["model"])
