"""The state of streamed data in checkpoints."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gda.training.data.stream import SequenceStream
from gda.training.runs.checkpoints import damage_reported

STREAM_FILE = "stream.safetensors"


class StreamCallback(TrainerCallback):
    """Saves the state of a stream with each checkpoint, so that a resumed run does not read the data again.

    The main process reads the stream for all, so only its state is saved.

    Args:
        stream: The training data.
        checkpoint: To continue from. Without a state in it, the Trainer reads again what it read before.
    """

    def __init__(self, stream: SequenceStream, checkpoint: Path | None):
        self.stream = stream
        if checkpoint is not None and (file := checkpoint / STREAM_FILE).is_file():
            with damage_reported(checkpoint):
                stream.resume(file)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stream.remember(self._per_step(args))  # the loader is one batch of each process ahead of the Trainer

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            path = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / STREAM_FILE
            self.stream.save(path, state.global_step * self._per_step(args))

    @staticmethod
    def _per_step(args: TrainingArguments) -> int:
        return args.train_batch_size * args.gradient_accumulation_steps * args.world_size
