"""Checkpoints of DeepSpeed's ZeRO-3, whose files belong to a number of processes."""

import subprocess
import sys
from pathlib import Path

from gda.common.files import remove
from gda.training.runs.checkpoints import step_of


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
            f"launch {written_by(checkpoint)} processes, as then"
        )
