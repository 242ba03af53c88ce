"""The report of a training run."""

import resource
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from gda.common.numbers import exponential, finite
from gda.conversion.push import PushReport


@dataclass(frozen=True)
class TrainReport:
    """What a training run did, or would do (`dry_run`).

    Attributes:
        out: The folder that was created.
        steps: Optimizer steps.
        tokens: Tokens read in these steps, padding included. Those of a second pass over the data count again.
        data_tokens: Tokens of the data, without padding and those that do not fill a sequence; None for a stream.
        num_parameters: Parameters of the model.
        num_trained: Parameters that were trained; of those that are partly new, only the new entries.
        first_loss: Mean loss of the first fifth of the log entries, in nats per token: a single batch is noisy. With a
            teacher, the whole loss (see `Distillation`).
        last_loss: Mean loss of the last fifth of the log entries.
        first_eval_loss: Loss on `eval_data` before the first step; None without `eval_data`.
        last_eval_loss: Loss on `eval_data` after the last step.
        tokens_per_second: Over all processes, in the training steps since the run was started or last resumed, without
            reading the data; None if there was no step.
        peak_memory: Peak memory in bytes, of the accelerator, or of the main process when training on the CPU.
        resumed_from: Step from which the run was last resumed; None if it was not.
        dry_run: Whether nothing was trained and written.
        notes: What the user should know.
        pushed: The report of the push to the Hub.
    """

    out: Path
    steps: int
    tokens: int
    data_tokens: int | None
    num_parameters: int
    num_trained: int
    first_loss: float | None = None
    last_loss: float | None = None
    first_eval_loss: float | None = None
    last_eval_loss: float | None = None
    tokens_per_second: float | None = None
    peak_memory: int | None = None
    resumed_from: int | None = None
    dry_run: bool = False
    notes: list[str] = field(default_factory=list)
    pushed: PushReport | None = None

    @property
    def first_perplexity(self) -> float | None:
        """exp of the first loss on `eval_data`."""
        return None if self.first_eval_loss is None else exponential(self.first_eval_loss)

    @property
    def last_perplexity(self) -> float | None:
        """exp of the last loss on `eval_data`."""
        return None if self.last_eval_loss is None else exponential(self.last_eval_loss)

    @classmethod
    def from_dict(cls, stored: Any, out: Path, folder: Path) -> "TrainReport":
        """The report that training.json in `folder` stores; ValueError naming the folder if it is not valid."""
        numbers = {each.name for each in fields(cls)} - {"out", "notes", "pushed", "dry_run"}
        try:
            report = cls(**stored, out=out)
            valid = all(isinstance(getattr(report, name), int | float | None) for name in numbers)
            if not valid or not isinstance(report.notes, list) or not all(isinstance(n, str) for n in report.notes):
                raise TypeError
        except TypeError:
            raise ValueError(f"{folder}: training.json has no valid report; start over with --overwrite") from None
        return report

    def stored(self) -> dict[str, Any]:
        """What training.json stores of it: everything except the folder and the push."""
        return {name: finite(value) for name, value in vars(self).items() if name not in ("out", "pushed")}

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values. Values that are not finite are None."""
        return self.stored() | {
            "out": str(self.out),
            "first_perplexity": finite(self.first_perplexity),
            "last_perplexity": finite(self.last_perplexity),
            "pushed": None if self.pushed is None else self.pushed.to_dict(),
        }


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of the accelerator, or of this process when training on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
