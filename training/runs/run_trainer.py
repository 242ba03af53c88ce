"""The Trainer of `gda train`: it stops cleanly, names damaged checkpoints and gives the trained model."""

from typing import Any

import torch
from torch import Tensor, nn

from gda.training.callbacks.stopping import StopCallback
from gda.training.runs.checkpoints import damage_reported
from gda.training.trainer import GDATrainer


class RunTrainer(GDATrainer):
    """A GDATrainer that takes no step on a loss or gradient that is not finite, and stops when it is interrupted.

    Args:
        stop: The callback that decides this.
    """

    def __init__(self, *args: Any, stop: StopCallback, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.stop = stop
        self._losses: list[Tensor] = []  # of the current step
        self.add_callback(stop)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As GDATrainer; keeps the loss for the check."""
        loss = super().training_step(*args, **kwargs)
        self._losses.append(loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As Trainer, which calls this between the gradients of a step and its update."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        loss = float(torch.stack(self._losses).sum())
        self._losses.clear()
        norm_value = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        self.stop.check_step(loss, norm_value, self.state.global_step + 1, self.args.device)
        return norm

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        with damage_reported(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with damage_reported(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with damage_reported(checkpoint):
            super()._load_rng_state(checkpoint)
