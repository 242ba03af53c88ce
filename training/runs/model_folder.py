"""The folder of the trained model: how it is read, how it is written again, and its model card."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig

from gda.common.assets import TOKENIZER_PATTERNS, copy_assets
from gda.common.errors import errors_as
from gda.common.files import stamps, write_text
from gda.common.trainable import TRAINABLE_FILE
from gda.conversion.sources.config_file import read_gda_config
from gda.conversion.sources.source import CARD_FILE, card_fields
from gda.conversion.sources.tokenizers import read_tokenizer
from gda.conversion.tensors.safetensors_io import SafetensorsReader
from gda.conversion.writing.card import model_card
from gda.conversion.writing.tokenizer_files import keep_reading
from gda.modeling_gda.modeling_gda import GDAForCausalLM
from gda.training.report import TrainReport
from gda.training.runs.checkpoints import dtypes_before_training
from gda.training.settings import TrainSettings


def model_stamps(model: Path) -> list[list[Any]]:
    """Name, size and modification time of each file of a model, a folder or GGUF file, that a run depends on."""
    if model.is_file():
        return stamps([model])
    patterns = ("*.safetensors*", "*.gguf", "config.json", TRAINABLE_FILE, *TOKENIZER_PATTERNS)
    return stamps(sorted({path for pattern in patterns for path in model.glob(pattern) if path.is_file()}))


def load(folder: Path) -> tuple[GDAForCausalLM, dict[str, torch.dtype]]:
    """The model in float32, because narrow weights lose small steps, and by parameter its data type on the disk.

    The weights of a checkpoint are float32. Its data types are those before training.

    Raises:
        ValueError: if weights and config do not fit.
    """
    with errors_as(f"{folder} cannot be loaded"):
        loaded: Any = GDAForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    model, loading = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(key if isinstance(key, str) else key[0] for key in loading[kind]):  # or with its shapes
            raise ValueError(f"{folder}: weights and config.json do not match, {kind.replace('_', ' ')}: {names[0]}")
    dtypes = stored_dtypes(folder)
    return model, {name: dtypes.get(name, torch.float32) for name, _ in model.named_parameters()}


def stored_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """By parameter, its data type on the disk, or for a checkpoint before training; without λ, which is never narrow.

    config.json may name a narrower one than some weights have.
    """
    specs = SafetensorsReader(folder).specs.items()
    before = {name: getattr(torch, dtype) for name, dtype in dtypes_before_training(folder).items()}
    return {name: spec.dtype for name, spec in specs if ".lambda_" not in name} | before


def add_companions(config: PreTrainedConfig, source: Path, folder: Path) -> None:
    """Write what belongs to the saved model beside it: the generation config, and the other files of `source`."""
    GenerationConfig.from_model_config(config).save_pretrained(folder)  # replaced by that of the source
    copy_companions(source, folder)
    keep_reading(read_tokenizer(source), folder)


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the tokenizer, the generation config, licences, and trainable.json if there is one."""
    copy_assets(source, folder)
    if (source / TRAINABLE_FILE).is_file():
        shutil.copyfile(source / TRAINABLE_FILE, folder / TRAINABLE_FILE)


def write_card(folder: Path, source: Path, name: str, history: list[str], *, has_code: bool) -> None:
    """Write README.md into the folder of a trained model, with the licence and the base model of its source's card."""
    config, card_data = read_gda_config(folder), card_fields(source)
    card = model_card(config, name=name, made=None, has_code=has_code, history=history, card_data=card_data)
    write_text(folder / CARD_FILE, card)


def training_step(settings: TrainSettings, report: TrainReport, source: str) -> str:
    """A sentence about the training: parameters, steps, data and losses."""
    before, after, what = report.first_eval_loss, report.last_eval_loss, "held-out loss"
    if before is None or after is None:
        before, after, what = report.first_loss, report.last_loss, "training loss"
    losses = "" if before is None or after is None else f"; {what} {before:.4f} before, {after:.4f} after"
    return (
        f"Trained from {source} (`--train {settings.train}`) for {report.steps:,} steps on {report.tokens:,} tokens, "
        f"any padding included, of {read_by(settings)}{losses}."
    )


def read_by(settings: TrainSettings) -> str:
    """The data of a training, and its teacher."""
    teacher = "" if settings.teacher is None else f", with the teacher {_short(settings.teacher)}"
    return f"{', '.join(map(_short, settings.data))}{teacher}"


def _short(name: str) -> str:
    """The last part of a path; what is on the Hub has its owner's name, too."""
    return Path(name).name if Path(name).exists() else name
