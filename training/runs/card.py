"""The model card of a trained model, and the sentence about its training."""

from pathlib import Path

from gda.common.files import write_text
from gda.conversion.sources.config_file import read_gda_config
from gda.conversion.sources.folder import FolderSource
from gda.conversion.writing.card import CARD_FILE, model_card
from gda.training.report import TrainReport
from gda.training.settings import TrainSettings


def write_card(folder: Path, source: Path, name: str, history: list[str], *, has_code: bool) -> None:
    """Write README.md into the folder of a trained model, with the licence and the base model of its source's card."""
    card_data = FolderSource(source).card_data()
    config = read_gda_config(folder)
    card = model_card(config, name=name, made=None, has_code=has_code, history=history, card_data=card_data)
    write_text(folder / CARD_FILE, card)


def training_step(settings: TrainSettings, report: TrainReport, source: str) -> str:
    """A sentence about the training: parameters, steps, data and losses."""
    data = ", ".join(Path(name).name if Path(name).exists() else name for name in settings.data)
    before, after, what = report.first_eval_loss, report.last_eval_loss, "held-out loss"
    if before is None or after is None:
        before, after, what = report.first_loss, report.last_loss, "training loss"
    teacher = "" if settings.teacher is None else f", with the teacher {Path(settings.teacher).name}"
    return (
        f"Trained from {source} (`--train {settings.train}`) for {report.steps:,} steps on {report.tokens:,} tokens of "
        f"{data}{teacher}; {what} {before:.4f} before, {after:.4f} after."
    )
