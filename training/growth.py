"""Masked growth under a Trainer: the mask rises from step to step (arXiv 2305.02869)."""

from typing import Any

from gda.training.rising import RisingCallback


class GrowthMaskCallback(RisingCallback):
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

    def current(self, model: Any) -> float | None:
        return model.config.growth_mask

    def assign(self, model: Any, value: float) -> None:
        model.set_growth_mask(value)

    def ready(self, model: Any) -> None:
        if model.config.growth_mask is None:
            raise ValueError(
                "GrowthMaskCallback: the model has no growth_mask, so there is nothing to raise; "
                "`gda grow --masked` makes a model that has one"
            )
