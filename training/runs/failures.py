"""Errors that end a run, in one line with what was kept and the remedy."""

import re
from pathlib import Path

from safetensors import SafetensorError

from gda.common.errors import DISK_IS_FULL, CheckFailed, first_line, is_out_of_memory
from gda.training.callbacks.stopping import NotFiniteError
from gda.training.runs.checkpoints import step_of
from gda.training.settings import TrainSettings

# Messages of torch and safetensors when the disk or a quota is full. They do not raise OSError.
NOT_WRITTEN = re.compile(r"PytorchStreamWriter|inline_container|file write failed|I/O error|os error (27|28|122)")


def explained(error: BaseException, last: Path | None, folder: Path, settings: TrainSettings) -> Exception | None:
    """The error to raise instead of `error`, which ended the run in `folder`; None if `error` is clear enough.

    `last` is the last complete checkpoint.
    """
    kept = "there is no checkpoint" if last is None else f"{last} holds step {step_of(last)}, the last good one"
    if last is None and folder.exists():
        kept += f"; {folder} is kept"
    if isinstance(error, NotFiniteError):
        remedy = f"lower --learning-rate {settings.learning_rate:g}, or examine the model with `gda inspect`"
        return CheckFailed(f"{error}: {kept}; {remedy}")
    if is_out_of_memory(error):
        return ValueError(f"{first_line(error)}; lower --batch-size or --context, or pass --gradient-checkpointing")
    is_full = isinstance(error, OSError) and error.errno in DISK_IS_FULL
    if is_full or (isinstance(error, RuntimeError | SafetensorError) and NOT_WRITTEN.search(str(error))):
        reason = error.strerror if is_full and isinstance(error, OSError) else first_line(error)
        remedy = "make room and run again" if last is None else "make room and continue with --resume"
        return OSError(f"{folder} cannot be written: {reason}: {kept}; {remedy}")
    return None
