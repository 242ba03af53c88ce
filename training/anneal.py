"""Annealing λ under a Trainer: from 0, over a target, to what is learned."""

import math
from typing import Any

from gda.training.rising import RisingCallback


class LambdaAnnealCallback(RisingCallback):
    """Lets the layers subtract by a mixture of a target and the λ that is learned, which ends as the latter alone.

    Optimizer step t of T = `num_steps` runs with

        λ = (1 − α) · (t / T) · λ_target + α · λ_learned,        α = min(1, t / T)

    whatever the λ type: what is learned is mixed with the target after it has been computed, for each layer, or token
    and head. From step T on, λ is what is learned, and a model saved then says nothing of the way. A schedule of this
    kind is due to DEX (arXiv 2505.16333), which was read in part only: the formula is the one given here, and may
    differ from that paper's.

    Evaluation sees the λ of its step, and so does who loads a checkpoint: its config.json has `lambda_anneal`, t / T,
    and `lambda_target`. Resuming from it goes on with the same schedule, whether the model was made anew or read from
    it. A model that another training left on the way goes on from where it is.

    Args:
        target: λ_target.
        num_steps: T, in optimizer steps.

    Raises:
        ValueError: if the target is not finite or `num_steps` is below 1; and when training begins, if the model or the
            checkpoint is on its way over another target, or the checkpoint in another number of steps.

    Example:
        >>> from transformers import Trainer
        >>> anneal = LambdaAnnealCallback(target=0.2, num_steps=1000)
        >>> trainer = Trainer(model, arguments, train_dataset=data, callbacks=[anneal])
    """

    def __init__(self, target: float, num_steps: int):
        super().__init__(num_steps)
        if not math.isfinite(target):
            raise ValueError(f"LambdaAnnealCallback needs a target that is finite, not {target}")
        self.target = float(target)

    def arguments(self) -> dict[str, Any]:
        return {"target": self.target} | super().arguments()

    def current(self, model: Any) -> float | None:
        return model.config.lambda_anneal

    def assign(self, model: Any, value: float) -> None:
        model.set_lambda_anneal(value)

    def ready(self, model: Any) -> None:
        if model.config.lambda_anneal is None:
            model.set_lambda_anneal(0.0, target=self.target)
        elif model.config.lambda_target != self.target:
            raise ValueError(
                f"LambdaAnnealCallback(target={self.target}): the model is on its way over another, and its λ would "
                f"jump; pass target={model.config.lambda_target}"
            )
