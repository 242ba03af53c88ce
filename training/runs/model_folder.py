"""The model that is trained: read from its folder, and written as it was read."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from gda.common.assets import copy_assets
from gda.common.errors import first_line
from gda.common.trainable import TRAINABLE_FILE
from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.sources.config_file import read_config_file
from gda.modeling_gda.modeling_gda import GDAForCausalLM
from gda.training.runs.run_folder import dtypes_before, stamps


def read_config(folder: Path) -> GDAConfig:
    """The config of the language model in `folder`.

    Raises:
        FileNotFoundError, ValueError: naming the file and the field, if it is another model or none.
    """
    path = folder / "config.json"
    raw = read_config_file(folder)
    if (model_type := raw.get("model_type")) != "gda":
        raise ValueError(f"{path} has model_type {model_type!r:.200}; `gda convert` makes a GDA model of a Llama")
    if (kinds := raw.get("architectures") or ["GDAForCausalLM"]) != ["GDAForCausalLM"]:
        raise ValueError(f"{path} describes {kinds}, no language model; architectures must be ['GDAForCausalLM']")
    if raw.get("quantization_config") is not None:
        raise ValueError(f"{path} has a quantization_config; dequantize the model and save it first")
    try:
        return GDAConfig.from_pretrained(folder)
    except Exception as error:  # whatever a malformed file makes the config class raise
        raise ValueError(f"{path} is not a valid configuration: {first_line(error)}") from None


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`.

    Raises:
        ValueError: if there is none that can be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers has no common error for it
        raise ValueError(f"{folder} holds no tokenizer that can be loaded: {first_line(error)}") from None


def model_stamps(folder: Path) -> list[list[Any]]:
    """Name, size and time of each file that a training run depends on."""
    patterns = ("*.safetensors", "*.safetensors.index.json", "config.json", "tokenizer*", TRAINABLE_FILE)
    return stamps(sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file()))


def load(folder: Path) -> tuple[GDAForCausalLM, dict[str, torch.dtype]]:
    """The model in float32, for small steps are lost on narrow weights; and the dtypes that its parameters have.

    Of a checkpoint, whose weights are float32, they are those before it was trained.

    Raises:
        ValueError: if weights and config do not fit.
    """
    try:
        loaded: Any = GDAForCausalLM.from_pretrained(
            folder, dtype="auto", use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:  # whatever a malformed folder makes transformers raise
        raise ValueError(f"{folder} cannot be loaded: {first_line(error)}") from None
    model, loading = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, loading[kind])):
            raise ValueError(f"{folder}: weights and config.json do not fit, {kind.replace('_', ' ')}: {names[0]}")
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    for name, dtype in (dtypes_before(folder) or {}).items():
        if name in dtypes:
            dtypes[name] = getattr(torch, dtype)
    return model.float(), dtypes


def save(
    model: GDAForCausalLM, dtypes: dict[str, torch.dtype], source: Path, folder: Path, *, bundle_code: bool
) -> None:
    """Write the model into `folder`, in the dtypes that it had, with all that lay beside it in `source`."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    model.generation_config = GenerationConfig.from_model_config(model.config)  # that of the source replaces it
    model.save_pretrained(folder)
    if not bundle_code:
        for code in folder.glob("*.py"):
            code.unlink()
        model.config.save_pretrained(folder, bundle_code=False)
    copy_companions(source, folder)


def copy_companions(source: Path, folder: Path) -> None:
    """Copy tokenizer, generation config, licences, and trainable.json if there is one."""
    copy_assets(source, folder)
    if (source / TRAINABLE_FILE).is_file():
        shutil.copyfile(source / TRAINABLE_FILE, folder / TRAINABLE_FILE)
