"""Training with a fade: arguments of a short run, callbacks that record the fade or stop, a check of the saved code."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from gda import GDAForCausalLM
from gda.training import FadeCallback

from .tiny import token_ids


def trainer_arguments(folder: Path, **options: Any) -> TrainingArguments:
    """Arguments of a short run on the CPU that logs and saves nothing by default."""
    plain: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 3,
    }
    return TrainingArguments(output_dir=str(folder), **plain | options)


class Recorder(FadeCallback):
    """Records the fade of each step."""

    def __init__(self, num_steps: int, lambda_target: float | None = None):
        super().__init__(num_steps, lambda_target)
        self.seen: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_begin(args, state, control, **kwargs)
        self.seen.append(kwargs["model"].config.fade)


class StopAt(TrainerCallback):
    """Stops training after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


@torch.no_grad()
def check_bundled_code_fades(model: GDAForCausalLM, folder: Path) -> None:
    """In a process without the package, the saved code applies, changes and saves the fade."""
    model.save_pretrained(folder / "model")
    torch.save(model(token_ids(2, 11)).logits, folder / "logits.pt")
    program = (
        "import sys; sys.modules['gda'] = None; import torch; from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder / 'model')!r}, trust_remote_code=True)\n"
        f"ids = torch.tensor({token_ids(2, 11).tolist()})\n"
        f"wanted = torch.load({str(folder / 'logits.pt')!r})\n"
        "with torch.no_grad(): torch.testing.assert_close(model(ids).logits, wanted)\n"
        "model.set_fade(0.75)\n"
        f"model.save_pretrained({str(folder / 'saved')!r})\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert json.loads((folder / "saved" / "config.json").read_text())["fade"] == 0.75
