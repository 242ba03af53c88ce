"""Checkpoints that are complete model folders."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gda.training.runs.checkpoints import mark_complete, remove_older
from gda.training.runs.model_folder import copy_companions
from gda.training.runs.processes import Processes


class CheckpointCallback(TrainerCallback):
    """Completes each checkpoint of the Trainer, marks it as complete, and only then removes older ones.

    The Trainer's `save_total_limit` would remove them before the new one is complete.

    Args:
        source: The folder of the model, for its tokenizer and licences.
        dtypes: By parameter, the data type that it had before training.
        keep: Number of checkpoints to keep.
        processes: The processes that write checkpoints.
    """

    def __init__(self, source: Path, dtypes: dict[str, str], keep: int, processes: Processes):
        self.source, self.dtypes, self.keep, self.processes = source, dtypes, keep, processes

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        folder = Path(str(args.output_dir))
        checkpoint = folder / f"checkpoint-{state.global_step}"

        def complete() -> None:
            copy_companions(self.source, checkpoint)
            mark_complete(checkpoint, self.dtypes)
            remove_older(folder, self.keep)

        self.processes.on_main(complete)  # begins when all processes have written their part
