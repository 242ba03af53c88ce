"""The Trainer of `gda train`: it stops cleanly, names damaged checkpoints and reads DeepSpeed's universal ones."""

import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils.constants import OPTIMIZER_NAME
from torch import Tensor, nn
from torch.distributed.fsdp.fully_sharded_data_parallel import StateDictType

from gda.common.files import remove
from gda.training.callbacks.stopping import StopCallback
from gda.training.runs.checkpoints import damage_reported, step_of
from gda.training.trainer import GDATrainer


class RunTrainer(GDATrainer):
    """A GDATrainer that stops after the step in which it is interrupted, or if a loss or gradient is not finite.

    It then ends before the update. DeepSpeed updates within the backward pass: right after it, without a checkpoint.
    """

    def __init__(self, *args: Any, stop: StopCallback, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.stop = stop
        self._losses: list[Tensor] = []  # of the current step
        self._weight_decays: list[float] | None = None  # by parameter group, if a universal checkpoint is read
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

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """As Trainer, which builds DeepSpeed's engine and then lets it read its checkpoint here."""
        try:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        except Exception:
            if self.deepspeed is None:
                raise  # the engine could not be built: the checkpoint is as good as it was
            with damage_reported(resume_from_checkpoint):
                raise

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        with damage_reported(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def expect_universal(self) -> None:
        """Read a checkpoint in DeepSpeed's universal form, see `make_universal`. Call this before `train`."""
        self.accelerator.state.deepspeed_plugin.deepspeed_config.setdefault("checkpoint", {})["load_universal"] = True
        self._weight_decays = [group["weight_decay"] for group in self.create_optimizer().param_groups]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.accelerator.is_fsdp2 and checkpoint is not None:
            self._require_same_form(Path(checkpoint))
        with damage_reported(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        if self._weight_decays is not None:
            self._mend_universal(self._weight_decays)

    def _require_same_form(self, checkpoint: Path) -> None:
        """Refuse a checkpoint of FSDP2 whose optimizer is in one file, unless the configuration asks for that."""
        whole = self.accelerator.state.fsdp_plugin.state_dict_type == StateDictType.FULL_STATE_DICT
        if (checkpoint / f"{OPTIMIZER_NAME}.bin").is_file() != whole:
            form = "SHARDED_STATE_DICT" if whole else "FULL_STATE_DICT"
            raise ValueError(f"--resume: {checkpoint} was written as {form}; set fsdp_state_dict_type: {form}")

    def _mend_universal(self, weight_decays: list[float]) -> None:
        """Undo two mistakes of DeepSpeed 0.19 in the optimizer that it has read from a universal checkpoint.

        All parameter groups have the settings of the first, and all states share one tensor that counts the steps, so
        that it counts each step once for every group.
        """
        engine, scheduler = cast(Any, self.model_wrapped), cast(Any, self.lr_scheduler)
        adam, rates = engine.optimizer.optimizer, scheduler.get_last_lr()
        for group, rate, decay in zip(adam.param_groups, rates, weight_decays, strict=True):
            group |= {"lr": rate, "weight_decay": decay}
        for state in adam.state.values():
            if isinstance(state["step"], Tensor):  # not with an offloaded optimizer
                state["step"] = state["step"].clone()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with damage_reported(checkpoint):
            super()._load_rng_state(checkpoint)


def written_by(checkpoint: Path) -> int:
    """The number of processes that wrote the checkpoint."""
    return len(list(checkpoint.glob("global_step*/*_optim_states.pt")))


def make_universal(checkpoint: Path) -> None:
    """Let DeepSpeed write the checkpoint again in its universal form, which any number of processes can read.

    Raises:
        ValueError: with DeepSpeed's last line, if it fails.
    """
    written = checkpoint / f"global_step{step_of(checkpoint)}"
    universal = written.with_name(f"{written.name}_universal")
    remove(universal)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(written), "--output_folder", str(universal)]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode != 0:
        reason = (ran.stderr.strip() or "no message").splitlines()[-1]
        raise ValueError(
            f"--resume: DeepSpeed cannot convert {checkpoint} for another number of processes ({reason}); "
            f"launch {written_by(checkpoint)} processes, as before"
        )
