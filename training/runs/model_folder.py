"""The folder of the trained model: how it is read, and how it is written again."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig

from gda.common.assets import copy_assets
from gda.common.errors import errors_as
from gda.common.files import stamps
from gda.common.trainable import TRAINABLE_FILE
from gda.conversion.sources.tokenizers import read_tokenizer
from gda.conversion.writing.tokenizer_files import keep_reading
from gda.modeling_gda.modeling_gda import GDAForCausalLM
from gda.training.runs.checkpoints import dtypes_before_training


def model_stamps(folder: Path) -> list[list[Any]]:
    """Name, size and modification time of each file that a training run depends on."""
    patterns = ("*.safetensors", "*.safetensors.index.json", "config.json", "tokenizer*", TRAINABLE_FILE)
    return stamps(sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file()))


def load(folder: Path) -> tuple[GDAForCausalLM, dict[str, torch.dtype]]:
    """The model in float32, because narrow weights lose small steps, and by parameter its data type on the disk.

    The weights of a checkpoint are float32. Its data types are those before training.

    Raises:
        ValueError: if weights and config do not fit.
    """
    with errors_as(f"{folder} cannot be loaded"):
        loaded: Any = GDAForCausalLM.from_pretrained(
            folder, dtype="auto", use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    model, loading = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, loading[kind])):
            raise ValueError(f"{folder}: weights and config.json do not match, {kind.replace('_', ' ')}: {names[0]}")
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    before = {name: getattr(torch, dtype) for name, dtype in dtypes_before_training(folder).items() if name in dtypes}
    return model.float(), dtypes | before


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
