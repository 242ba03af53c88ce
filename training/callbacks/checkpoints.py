"""Checkpoints that are complete model folders."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gda.common.files import write_json
from gda.conversion.sources.source import TRAINING_FILE
from gda.conversion.writing.provenance import history_of
from gda.training.data.stream import SequenceStream
from gda.training.runs.checkpoints import mark_complete, remove_older
from gda.training.runs.model_folder import copy_companions, read_by, write_card
from gda.training.runs.processes import Processes
from gda.training.settings import TrainSettings

STREAM_FILE = "stream.safetensors"


@dataclass(eq=False)
class CheckpointCallback(TrainerCallback):
    """Completes each checkpoint of the Trainer, marks it as complete, and only then removes older ones.

    The Trainer's `save_total_limit` would remove them before the new one is complete. The state of a stream is saved
    too, so that a resumed run does not read the data again.
    """

    source: Path  # the folder of the model, for its tokenizer, licences and history
    dtypes: dict[str, str]  # by parameter, before training
    settings: TrainSettings
    processes: Processes
    stream: SequenceStream | None = None  # which the main process reads for all

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.stream is not None:
            self.stream.remember(_per_step(args))  # the loader is one batch of each process ahead of the Trainer

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        folder = Path(str(args.output_dir))
        checkpoint = folder / f"checkpoint-{state.global_step}"

        def complete() -> None:
            if self.stream is not None:
                self.stream.save(checkpoint / STREAM_FILE, state.global_step * _per_step(args))
            copy_companions(self.source, checkpoint)
            trained = f"Trained (`--train {self.settings.train}`) for {state.global_step:,} steps so far on"
            history = [*history_of(self.source), f"{trained} {read_by(self.settings)}."]
            write_json(checkpoint / TRAINING_FILE, {"history": history})
            mark_complete(checkpoint, self.dtypes)
            # A card may be edited, so its size is not among those that the checkpoint must have.
            write_card(checkpoint, self.source, checkpoint.name, history, has_code=True)
            remove_older(folder, self.settings.keep)

        self.processes.gather(None)  # so that all processes have written their part
        self.processes.on_main(complete)


def _per_step(args: TrainingArguments) -> int:
    """Sequences that all processes read in an optimizer step."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size
