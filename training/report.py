"""What training did."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from gda.common.numbers import exponential, finite
from gda.conversion.push import PushReport


@dataclass(frozen=True)
class TrainReport:
    """What training did, or by `dry_run` would do.

    Attributes:
        out: The folder that was made.
        steps: Optimizer steps.
        tokens: Tokens that the model read in them; those of a second pass over the data count again.
        data_tokens: Tokens in the windows that the data fills; None when streaming.
        first_loss: Loss of the first step, nats a token; with a teacher, all of it (see `Distillation`).
        last_loss: Mean loss of the last steps, as many as lie between two entries of the log.
        first_eval_loss: Loss on `eval_data` before the first step; None without.
        last_eval_loss: And after the last.
        num_parameters: Of the model.
        num_trained: Those that could move; of parameters that are new in part, the new entries.
        tokens_per_second: Over all processes, in training steps of the last session, without the time for reading the
            data; None if it did none.
        peak_memory: Bytes of the accelerator, or of the main process where it trains on the CPU.
        resumed_from: The step that the last session went on from.
        dry_run: Whether nothing was trained and written.
        notes: What else one should know.
        pushed: What was pushed to the Hub.
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
    def read(cls, told: Any, out: Path, where: Path) -> "TrainReport":
        """The report of a run that came to its end, as training.json in the folder `where` tells it.

        Raises:
            ValueError: naming the folder, if it is none.
        """
        numbers = {each.name for each in fields(cls)} - {"out", "notes", "pushed", "dry_run"}
        try:
            report = cls(**told, out=out)
            values = {name: getattr(report, name) for name in numbers}
            whole = all(isinstance(value, int | float | None) for value in values.values())
            if not whole or not isinstance(report.notes, list) or not all(isinstance(n, str) for n in report.notes):
                raise TypeError
        except TypeError:
            raise ValueError(f"{where} does not tell what a run came to; --overwrite begins anew") from None
        return report

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values; what is not finite is None."""
        told = vars(self) | {
            "out": str(self.out),
            "first_perplexity": self.first_perplexity,
            "last_perplexity": self.last_perplexity,
            "pushed": None if self.pushed is None else self.pushed.to_dict(),
        }
        return {name: finite(value) for name, value in told.items()}
