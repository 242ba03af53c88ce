"""Checkpoints of a run: which of them are complete, and which are kept."""

import contextlib
import math
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from gda.common.errors import first_line, is_out_of_memory
from gda.common.files import read_json, remove, sync, sync_tree, write_json
from gda.common.progress import logger
from gda.training.runs.processes import reported_elsewhere
from gda.training.runs.watch import peer_is_gone
from gda.training.sharding import first_failure

# In a checkpoint, written when all of its files are on the disk. A checkpoint without it is incomplete.
CHECKPOINT_FILE = "checkpoint.json"
NAME = re.compile(r"checkpoint-(\d+)")
# Data types in which models are stored, by torch's names.
DTYPES = ("float32", "bfloat16", "float16", "float64")


def checkpoints(folder: Path, *, complete: bool = True) -> list[Path]:
    """The checkpoints in `folder`, oldest first: the complete ones, or all. None in a folder that does not exist."""
    try:
        found = [path for path in folder.iterdir() if NAME.fullmatch(path.name) and path.is_dir()]
    except FileNotFoundError:  # the main process may have removed it, or this machine does not see it
        return []
    return sorted((path for path in found if not complete or _first_damaged(path) is None), key=step_of)


def last_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint in `folder`, if there is one."""
    return next(reversed(checkpoints(folder)), None)


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which it was saved."""
    return int(checkpoint.name.rpartition("-")[2])


def mark_complete(checkpoint: Path, dtypes: Mapping[str, str]) -> None:
    """Write checkpoint.json, which says that all files are on the disk, and how large they are.

    `dtypes` are the data types that the parameters had before they were trained in float32.
    """
    sync_tree(checkpoint)
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
    write_json(checkpoint / CHECKPOINT_FILE, {"files": sizes, "dtypes": dict(dtypes)})
    sync(checkpoint.parent)


def _first_damaged(checkpoint: Path) -> str | None:
    """A file that is missing or has another size than checkpoint.json says, or that file; None if all are complete."""
    sizes = read_or_empty(checkpoint / CHECKPOINT_FILE).get("files")
    if not isinstance(sizes, dict):
        return CHECKPOINT_FILE
    files = ((name, checkpoint / name, size) for name, size in sizes.items())
    return next((name for name, file, size in files if not file.is_file() or file.stat().st_size != size), None)


def dtypes_before_training(folder: Path) -> dict[str, str]:
    """By parameter, its data type before training, if `folder` is a checkpoint; otherwise empty.

    Raises:
        ValueError: naming the file and the parameter, if models are not stored in a data type.
    """
    dtypes = read_or_empty(folder / CHECKPOINT_FILE).get("dtypes")
    if not isinstance(dtypes, dict):
        return {}
    for name, dtype in dtypes.items():
        if dtype not in DTYPES:
            raise ValueError(
                f"{folder / CHECKPOINT_FILE}: the dtype of {name} is {dtype!r:.100}, not one of {', '.join(DTYPES)}"
            )
    return dtypes


def remove_incomplete(folder: Path) -> None:
    """Remove checkpoints that were not finished or are damaged; the log names a damaged file."""
    for checkpoint in checkpoints(folder, complete=False):
        if (name := _first_damaged(checkpoint)) is None:
            continue
        if name != CHECKPOINT_FILE:
            logger.warning("%s is missing or cut, so its checkpoint is removed", checkpoint / name)
        remove(checkpoint)


def remove_older(folder: Path, keep: int) -> None:
    """Remove all complete checkpoints except the last `keep`."""
    for checkpoint in checkpoints(folder)[:-keep]:
        (checkpoint / CHECKPOINT_FILE).unlink()  # first, so that a killed process leaves it incomplete
        remove(checkpoint)


def read_or_empty(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if there is none that can be read."""
    try:
        return dict(read_json(path))
    except (OSError, ValueError, TypeError):
        return {}


# ------------------------------------------------------------------------------------------------------------- resuming


class DamagedCheckpointError(ValueError):
    """A checkpoint cannot be read."""


@contextlib.contextmanager
def damage_reported(checkpoint: str | Path | None) -> Iterator[None]:
    """Turn errors while a checkpoint is read into one line with its name and the remedy."""
    try:
        with first_failure():
            yield
    except Exception as error:  # torch has no common error class for damaged files
        if isinstance(error, DamagedCheckpointError) or peer_is_gone(error) or is_out_of_memory(error):
            raise
        damage = DamagedCheckpointError(
            f"--resume: {checkpoint} is damaged ({first_line(error)}); remove it to resume from the checkpoint "
            "before it, or start over with --overwrite"
        )
        raise reported_elsewhere(damage) if hasattr(error, "reported_elsewhere") else damage from None


def require_readable(checkpoint: Path) -> None:
    """Refuse a checkpoint with a cut file of torch, or whose trainer_state.json belongs to another step.

    One process can so name a damaged file, before all of them read it.
    """
    with damage_reported(checkpoint):
        for file in sorted(checkpoint.rglob("*.pt*")):
            if not zipfile.is_zipfile(file):
                raise ValueError(f"{file.relative_to(checkpoint)} is cut or was overwritten")
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        numbers = [state.epoch, state.max_steps, state.num_input_tokens_seen, state.total_flos]
        for entry in state.log_history:
            numbers += [entry.get("loss", 0.0), entry.get("step", 0)]
        are_numbers = all(type(each) in (int, float) and math.isfinite(each) for each in numbers)
        is_whole = are_numbers and isinstance(state.stateful_callbacks, dict)
        if state.global_step != step_of(checkpoint) or not is_whole:
            raise ValueError(f"{TRAINER_STATE_NAME} is not the state of step {step_of(checkpoint)}")
