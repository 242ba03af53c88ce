"""Options of the commands that read and write checkpoints. Nothing heavy is imported here, so `--help` is fast."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gda.common.options import Options, argument, option

LAYOUT, NEW_HEADS, SPLIT = "Source and layout", "New heads", "Split"
OUTPUT, HUB = "Output", "Hub"


@dataclass(frozen=True)
class WriteOptions(Options):
    """What every command that writes a model's folder offers."""

    dtype: Literal["keep", "float32", "bfloat16", "float16"] = option(
        "keep", "Data type of the weights. λ is always float32.", panel=OUTPUT
    )
    max_shard_size: str | int = option("5GB", "Largest weight file, such as 5GB or 400MB.", panel=OUTPUT)
    verify: bool = option(
        True, "Compare the result with its source before it appears.", panel=OUTPUT, flag="--verify/--no-verify"
    )
    resume: bool = option(False, "Continue from the files that an interrupted run finished.", panel=OUTPUT)
    overwrite: bool = option(False, "Replace OUT if it exists.", panel=OUTPUT)
    bundle_code: bool = option(
        True,
        "Save the model's code beside the weights: they load with trust_remote_code where gda is not installed.",
        panel=OUTPUT,
    )
    dry_run: bool = option(False, "Check everything, write nothing.", panel=OUTPUT)
    revision: str | None = option(None, "Branch, tag or commit of a Hub id.", panel=HUB)


@dataclass(frozen=True)
class ConvertOptions(WriteOptions):
    """Options of `gda convert`."""

    source: str | Path = argument("Model to convert: a folder of safetensors, a Hub id or a .gguf file.")
    out: str | Path = argument("Folder to create.")
    mode: Literal["expand", "split", "map"] | None = option(
        None,
        "expand adds noise heads to a Llama, Mistral or Qwen and is lossless; split turns some of its heads into noise "
        "heads, which loses a little; map renames the tensors of a Motif or DiffLlama. Default: the lossless mode.",
        panel=LAYOUT,
    )
