"""Options of the commands that convert, check and share models. Nothing heavy is imported, so `--help` is fast."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gda.common.files import refuse_existing, refuse_overlap
from gda.common.options import HUB, OUTPUT, Options, argument, as_names, flag, option
from gda.common.places import (
    GDA_REMEDY,
    check_folder,
    check_gda_model,
    check_model,
    check_plain_model,
    check_repository,
    check_served,
    check_text,
    config_entry,
    gguf_file,
    layers_of,
    refuse_gda,
)
from gda.conversion.growth import growth
from gda.conversion.noise_heads import added, divided

LAYOUT, NEW_HEADS, SPLIT, GROWTH = "Source and layout", "Noise heads", "Split", "Growth"
COMPARISON = "Comparison"
SIZE = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+) *([KMGT])B", re.IGNORECASE)
POWERS = {"K": 3, "M": 6, "G": 9, "T": 12}
RATIO = re.compile(r"0*[1-9][0-9]*(:1)?")
SPLIT_ONLY = ("calibration", "calibration_tokens", "effort")
PAPER_ONLY = ("lambda_init", "kv_layout", "head_norm")
HEAD_COUNTS = ("num_attention_heads", "num_key_value_heads")
PLAIN_TYPES = ("llama", "mistral", "qwen2", "qwen3")
NO_NOISE_HEADS = "needs a model without noise heads; use --mode map or omit --mode"
NOISE_HEADS = "needs a model with noise heads; use --mode expand or split, or omit --mode"
NOTHING_TO_FOLD = "has no qk_rank: its projections are dense, so there is nothing to fold"
NOT_EXPORTED = "has no conversion.json of an export with noise heads; omit --mode restore"
MAX_HEADS = 4096  # more are checked when the model is opened
SAMPLED = "sampled"  # the name of the text that a source writes itself, as a value of --calibration
SAMPLED_WEIGHT = 2.0  # of that text beside files: most of what a source can do is in no file


@dataclass(frozen=True)
class ReplaceOptions(Options):
    """Option of every command that writes a folder."""

    overwrite: bool = option(
        False,
        "Replace OUT if it exists, and what an unfinished run left, unless --resume continues it.",
        panel=OUTPUT,
    )

    def check_places(self) -> None:
        super().check_places()
        given = vars(self)
        if (out := given.get("out")) is not None:
            refuse_overlap(given.get("source") or given.get("model") or "", out)
            refuse_existing(Path(out), self.overwrite)


@dataclass(frozen=True)
class BundleOptions(Options):
    """Option of every command that writes or pushes a GDA model."""

    bundle_code: bool = option(
        True,
        "Include the model's code, so that trust_remote_code can load the model where gda is not installed.",
        panel=OUTPUT,
    )


@dataclass(frozen=True)
class RevisionOptions(Options):
    """Option of every command that reads a model which may be on the Hub."""

    revision: str | None = option(
        None, "Branch, tag or commit of the model, if it is a Hub id. Default: its main branch.", panel=HUB
    )


@dataclass(frozen=True)
class CheckpointOptions(ReplaceOptions, RevisionOptions):
    """Options of every command that writes a model from another model."""

    dtype: Literal["keep", "float32", "bfloat16", "float16"] = option(
        "keep", "Data type of the weights. λ is never narrowed.", panel=OUTPUT
    )
    workers: int = option(1, "Number of weight files to write at once.", panel=OUTPUT, metavar="N", minimum=1)
    verify: bool = option(
        True, "Compare the result with its source before OUT appears.", panel=OUTPUT, flag="--verify/--no-verify"
    )
    resume: bool = option(
        False, "Continue an interrupted run with its finished work. Start a new run if there is none.", panel=OUTPUT
    )
    dry_run: bool = option(
        False, "Check options, model and tokenizer, but write no model; a Hub id is still downloaded.", panel=OUTPUT
    )
    max_shard_size: str | int = option("5GB", "Largest weight file, such as 5GB or 400MB.", panel=OUTPUT)

    def __post_init__(self) -> None:
        super().__post_init__()
        parsed_size(self.max_shard_size)


@dataclass(frozen=True)
class WriteOptions(CheckpointOptions, BundleOptions):
    """Options of every command that writes a GDA model from another model."""


@dataclass(frozen=True)
class SplitOptions(WriteOptions):
    """Options of `--mode split`."""

    calibration: tuple[str, ...] = option(
        (),
        "Calibration text: a text file, or .jsonl with a field `text`. May be repeated; FILE:2 counts twice as much as "
        "FILE. `sampled` is text that the source writes itself. Beside files it has weight 2; `sampled:3` changes the "
        "weight, and `sampled:0` omits it. Default: sampled.",
        panel=SPLIT,
        metavar="FILE[:WEIGHT]",
        check=lambda text: _check_calibration(text),
    )
    calibration_tokens: int | None = option(
        None, "Number of tokens to fit to. Default: 98,304, or 16,384 with --effort fast.", panel=SPLIT, metavar="N"
    )
    effort: Literal["fast", "default"] | None = option(
        None,
        "fast: choose heads, λ and output projections in closed form. default: then also train the attention on the "
        "source's predictions for 96 steps. Default: default.",
        panel=SPLIT,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "calibration", as_names(self.calibration))

    def calibration_weights(self) -> dict[str, float]:
        """The weight of each calibration file, by path, and of the text that the source writes, as `sampled`.

        Raises:
            ValueError: naming a text whose weight is not a positive number, or that is named twice; without any text.
        """
        weights: dict[str, float] = {}
        for each in self.calibration:
            name, weight = _weighted(each)
            if any(name == other or Path(name).resolve() == Path(other).resolve() for other in weights):
                raise ValueError(f"--calibration names {name} twice; give it a weight instead, such as {name}:2")
            weights[name] = weight
        weights = {SAMPLED: SAMPLED_WEIGHT} | weights
        if not any(weights.values()):
            raise ValueError(f"--calibration {SAMPLED}:0 leaves no text; name a file, too")
        return weights


@dataclass(frozen=True)
class NewHeadOptions(WriteOptions):
    """Options of the noise heads that a Llama, Mistral or Qwen gets."""

    noise_heads: int | None = option(
        None,
        "Number of noise heads that a Llama, Mistral or Qwen gets. `gda convert --mode split` turns existing "
        "heads into them. Default: one per KV head; no other number was clearly better (docs/evidence.md).",
        panel=NEW_HEADS,
        metavar="N",
    )
    ratio: str | int | None = option(
        None,
        "Signal heads per noise head, such as 4 or 4:1. Can't be combined with --noise-heads.",
        panel=NEW_HEADS,
        metavar="R",
    )
    lambda_type: Literal["reparameterized", "tanh", "sigmoid"] | None = option(
        None,
        "How λ is computed. reparameterized: one λ per layer. tanh, sigmoid: one λ per token and signal head. sigmoid "
        "is never 0, so training fades it in, except after `gda convert --mode split`, where it starts at ½. Default: "
        "reparameterized, since a Llama can express it, and tanh did not train better (docs/evidence.md).",
        panel=NEW_HEADS,
    )
    lambda_init: Literal["zero", "schedule"] | None = option(
        None,
        "zero: λ starts at 0. schedule: fade λ in from 0 to the λ_init of the DIFF Transformer, "
        "0.8 − 0.6·exp(−0.3·layer). Needs --lambda-type reparameterized. Default: zero.",
        panel=NEW_HEADS,
    )
    kv_layout: Literal["shared", "paired"] | None = option(
        None,
        "shared: noise heads read the keys and values of the signal heads. paired: separate keys and wider values, as "
        "in the GDA paper; the KV cache doubles. Default: shared.",
        panel=NEW_HEADS,
    )
    head_norm: bool | None = option(
        None,
        "Apply an RMSNorm to each signal head's output, as in the GDA paper but with an epsilon of 1, which changes a "
        "pretrained model less. Training fades it in. Default: no head norm, since it raised the loss in "
        "short trainings (docs/evidence.md).",
        panel=NEW_HEADS,
        flag="--head-norm/--no-head-norm",
    )
    seed: int = option(0, "Seed of all random numbers.", panel=NEW_HEADS, minimum=0, maximum=2**32 - 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio is None:
            return
        if self.noise_heads is not None:
            raise ValueError("--ratio and --noise-heads set the same number; pass one of them")
        if not RATIO.fullmatch(str(self.ratio)):
            raise ValueError(f"--ratio {self.ratio} is not a ratio such as 4 or 4:1")

    def check_heads(self, model: str | Path, mode: str | None) -> None:
        """Check the number of noise heads, if `model` is the folder of a Llama or its like.

        Raises:
            ValueError: for a number that is impossible, naming those that are possible.
        """
        heads, kv_heads = (config_entry(model, name, int) or 0 for name in HEAD_COUNTS)
        if config_entry(model, "model_type", str) not in PLAIN_TYPES or not 0 < kv_heads <= heads <= MAX_HEADS:
            return  # what can't be told at a glance is checked when the model is opened
        if mode == "split":
            divided(heads, kv_heads, noise_heads=self.noise_heads, ratio=self.ratio)
        elif mode in (None, "expand"):
            layout = self.kv_layout or "shared"
            added(heads, kv_heads, noise_heads=self.noise_heads, ratio=self.ratio, kv_layout=layout)


@dataclass(frozen=True)
class VisibilityOptions(Options):
    """Option of every command that pushes to the Hub."""

    private: bool | None = option(
        None,
        "Create the repository as private or public, and refuse an existing one that differs. Default: your account's "
        "setting for new repositories.",
        panel=HUB,
        flag="--private/--public",
    )


@dataclass(frozen=True)
class HubOptions(VisibilityOptions):
    """Options of pushing the result to the Hub."""

    push_to_hub: str | None = option(
        None,
        "Push OUT to this repository, such as me/llama-gda. Default: no push.",
        panel=HUB,
        metavar="REPO",
        check=check_repository,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.private is not None and self.push_to_hub is None:
            raise ValueError("--private and --public have no effect without --push-to-hub")


@dataclass(frozen=True)
class ConvertOptions(NewHeadOptions, SplitOptions, HubOptions):
    """Options of `gda convert`."""

    source: str | Path = argument(
        "Model to convert: a folder of safetensors, a Hub id or a GGUF file.", check=check_model
    )
    out: str | Path = argument("Folder to create.")
    mode: Literal["expand", "split", "map", "restore"] | None = option(
        None,
        "expand: add noise heads to a Llama, Mistral or Qwen, which is lossless. split: turn some of its heads into "
        "noise heads, which is lossy. map: rename and reorder the tensors of a Motif or DiffLlama. restore: recover "
        "the GDA model from a plain model that `gda export` wrote. Default: expand, map or restore, by SOURCE.",
        panel=LAYOUT,
    )
    qk_rank: int | None = option(
        None,
        "Factor queries, and paired keys, into a base shared by the heads of a group and an update of this rank for "
        "each head. SOURCE may also be a GDA model. Default: dense projections.",
        panel=LAYOUT,
        metavar="RANK",
        minimum=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refused, mode = (PAPER_ONLY, "expand") if self.mode == "split" else (SPLIT_ONLY, "split")
        for name in refused:
            if getattr(self, name) not in (None, ()):
                raise ValueError(f"{flag(name)} is only for --mode {mode}")
        if self.mode == "split" and self.qk_rank is not None:
            raise ValueError(
                "--qk-rank can't be combined with --mode split; split first, then convert the result with --qk-rank"
            )

    def check_places(self) -> None:
        super().check_places()
        for file in self.calibration_weights().keys() - {SAMPLED}:
            refuse_overlap(file, self.out, f"the calibration text {file}")
        if self.qk_rank is None:
            refuse_gda(self.source, GDA_REMEDY)
        model_type = config_entry(self.source, "model_type", str)
        if self.mode == "map" and model_type in PLAIN_TYPES:
            raise ValueError(f"{self.source} is a {model_type!r} model: --mode map {NOISE_HEADS}")
        exported = (Path(self.source) / "conversion.json").exists()
        if self.mode == "restore" and model_type in PLAIN_TYPES and not exported:
            raise ValueError(f"{self.source} {NOT_EXPORTED}")
        self.check_heads(self.source, self.mode)


@dataclass(frozen=True)
class GrowOptions(NewHeadOptions):
    """Options of `gda grow`."""

    model: str | Path = argument(
        "Model to grow, a GDA model or one that `gda convert` accepts: a folder, a Hub id or a GGUF file.",
        check=check_model,
    )
    out: str | Path = argument("Folder to create.")
    signal: int | float | None = option(
        None,
        "Factor, at least 2, by which the signal heads grow: r:1 becomes M·r:1. Default: no new heads.",
        panel=GROWTH,
        metavar="M",
    )
    depth: int | None = option(
        None,
        "Number of layers of the result. New layers have no effect at first. They are copies or, with --masked, what "
        "--new-layers says. Default: no new layers.",
        panel=GROWTH,
        metavar="LAYERS",
    )
    layers: str | list[int] | None = option(
        None,
        "Layers to copy, such as 3,7,11, counted from 0; implies --depth. Default: evenly spread.",
        panel=GROWTH,
        metavar="LIST",
    )
    hidden: int | float | None = option(
        None,
        "Factor, at least 2, by which the hidden size grows. Default: no growth.",
        panel=GROWTH,
        metavar="M",
    )
    width: int | float | None = option(
        None,
        "Factor, at least 2, by which the hidden size, the MLP and all numbers of heads grow. Default: no growth.",
        panel=GROWTH,
        metavar="M",
    )
    masked: bool = option(
        False,
        "Add new heads, neurons and layers that training fades in. Their weights are random, except those of "
        "new layers with --new-layers copy.",
        panel=GROWTH,
    )
    new_layers: Literal["copy", "random"] | None = option(
        None,
        "With --masked, what new layers start as. copy: copies of their neighbours, blended with their input. "
        "random: random weights. Default: random.",
        panel=GROWTH,
    )
    mlp: int | float | None = option(
        None,
        "Factor, at least 2, by which the neurons of the MLP grow, or with --masked a fraction such as 1.5. "
        "Default: no growth.",
        panel=GROWTH,
        metavar="M",
    )
    untie: bool = option(
        False, "Give the language-model head weights of its own, which start as the embeddings.", panel=GROWTH
    )
    noise_std: float = option(
        0.01,
        "Standard deviation of the noise that makes replicas differ, relative to that of the weight. The noise sums to "
        "zero over the replicas, so the logits stay the same.",
        panel=GROWTH,
        minimum=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in growth.uniform(self).items():
            object.__setattr__(self, name, value)

    def check_places(self) -> None:
        super().check_places()
        self.check_heads(self.model, "expand")
        if (layers := layers_of(self.model)) is not None:
            growth.copied_layers(self, layers)  # refuses an impossible depth or layer


@dataclass(frozen=True)
class FoldOptions(WriteOptions):
    """Options of `gda fold`."""

    model: str | Path = argument("GDA model with qk_rank: a folder or a Hub id.", check=check_gda_model)
    out: str | Path = argument("Folder to create.")

    def check_places(self) -> None:
        super().check_places()
        is_gda = config_entry(self.model, "model_type", str) == "gda"
        if is_gda and config_entry(self.model, "qk_rank", int) is None:
            raise ValueError(f"{self.model} {NOTHING_TO_FOLD}")


@dataclass(frozen=True)
class ExportOptions(CheckpointOptions):
    """Options of `gda export`."""

    model: str | Path = argument("GDA model: a folder or a Hub id.", check=check_gda_model)
    out: str | Path = argument("Folder to create, or with --format gguf the file.")
    format: Literal["llama", "mistral", "qwen2", "qwen3", "motif", "diffllama", "gguf"] = option(
        "llama",
        "Model type to write. If a llama, mistral, qwen2 or qwen3 cannot express the model, another of these four is "
        "written. gguf: one file for llama.cpp, Ollama and LM Studio; OUT must end in .gguf.",
        panel=LAYOUT,
    )
    heads: Literal["original", "all"] | None = option(
        None,
        "original: only the signal heads, which requires λ = 0. all: signal and noise heads, with λ in the output "
        "projection. Default: original where every λ is 0, otherwise all.",
        panel=LAYOUT,
    )
    dtype: Literal["keep", "float32", "bfloat16", "float16", "q8_0"] = option(  # type: ignore[assignment]
        "keep",
        "Data type of the weights. q8_0: 8 bits per value, with one scale per block of 32; only for gguf.",
        panel=OUTPUT,
    )
    tokenizer: str | Path | None = option(
        None,
        "With gguf, copy the tokenizer and the chat template from this GGUF file. Default: the model's own, translated "
        "to GGUF.",
        panel=OUTPUT,
        metavar="FILE",
        check=check_text,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format == "gguf" and Path(self.out).suffix != ".gguf":
            raise ValueError(f"--format gguf writes one file: OUT must end in .gguf; got {Path(self.out).name}")
        for name in ("max_shard_size", "workers", "resume") if self.format == "gguf" else ("tokenizer",):
            if getattr(self, name) != getattr(type(self), name):
                beside = "which writes one file" if self.format == "gguf" else "which writes tokenizer.json"
                raise ValueError(f"{flag(name)} has no effect with --format {self.format}, {beside}")
        if self.dtype == "q8_0" and self.format != "gguf":
            raise ValueError(f"--dtype q8_0 is for --format gguf, not for {self.format}")


@dataclass(frozen=True)
class VerifyOptions(RevisionOptions):
    """Options of `gda verify`."""

    source: str | Path = argument(
        "Model that OUT was converted from: a folder, a Hub id or a GGUF file.", check=check_model
    )
    out: str | Path = argument("Converted model: a folder or a Hub id.", check=check_model)
    revision: str | None = option(
        None, "Branch, tag or commit of SOURCE, if it is a Hub id. Default: its main branch.", panel=HUB
    )
    method: Literal["auto", "full", "layers", "tensors"] = option(
        "auto",
        "full: run both models. layers: run both with one layer in memory at a time. tensors: convert every tensor "
        "again and compare bits. auto: full if both models fit into a quarter of the free memory, otherwise layers; "
        "tensors if transformers cannot run the source.",
        panel=COMPARISON,
    )
    threshold: float | None = option(
        None,
        "Largest |Δlogit| that passes, relative to the source's largest |logit|. Default: 1e-5, or no limit after a "
        "lossy conversion.",
        panel=COMPARISON,
        metavar="X",
        minimum=0,
    )

    def check_places(self) -> None:
        super().check_places()
        source, out = Path(self.source), Path(self.out)
        if gguf_file(out) is not None:
            raise ValueError(f"{out} is a GGUF file, which can only be SOURCE; perhaps swap: gda verify {out} {source}")
        if _is_converted(source) and out.is_dir() and not _is_converted(out):
            raise ValueError(f"{source} is converted and {out} is not; swap them: gda verify {out} {source}")


@dataclass(frozen=True)
class InspectOptions(RevisionOptions):
    """Options of `gda inspect`."""

    model: str | Path = argument("GDA model: a folder or a Hub id.", check=check_gda_model)


@dataclass(frozen=True)
class PushOptions(VisibilityOptions, BundleOptions):
    """Options of `gda push`."""

    folder: str | Path = argument("Folder of a GDA model.", check=check_folder)
    repo: str = argument(
        "Repository on the Hub, owner/name or name; created if it doesn't exist.", check=check_repository
    )
    revision: str = option("main", "Branch to push to; created if it doesn't exist.", panel=HUB, metavar="BRANCH")
    message: str | None = option(None, "Title of the commit. Default: Upload FOLDER.", panel=HUB)
    dry_run: bool = option(False, "Check the folder and list its files, but push nothing.", panel=OUTPUT)


@dataclass(frozen=True)
class ServeOptions(Options):
    """Options of `gda serve`."""

    model: str = argument("GDA model: a folder or a Hub id, optionally with @REVISION.", check=check_served)


@dataclass(frozen=True)
class DemoOptions(ReplaceOptions):
    """Options of `gda demo`."""

    source: str | Path | None = option(
        None,
        "Llama to convert: a folder, a Hub id or a GGUF file. Default: SmolLM2-135M-Instruct.",
        panel=LAYOUT,
        check=check_plain_model,
    )
    out: str | Path | None = option(
        None, "Folder to save the converted model to. Default: it is not saved.", panel=OUTPUT
    )


def parsed_size(size: str | int) -> int:
    """A size such as "5GB" in bytes; ValueError for anything else."""
    match = SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    parsed: Any = size
    if match and math.isfinite(number := float(match[1]) * 10 ** POWERS[match[2].upper()]):
        parsed = int(number)
    if type(parsed) is not int or parsed < 1:
        raise ValueError(f"--max-shard-size {size!r} is not a size such as 5GB or 400MB")
    return parsed


def _weighted(text: str) -> tuple[str, float]:
    """A text of --calibration and its weight, which may follow a colon. A file may have a colon in its name."""
    name, colon, weight = text.rpartition(":")
    if not colon or Path(text).is_file():
        return text, SAMPLED_WEIGHT if text == SAMPLED else 1.0
    try:
        value = float(weight)
    except ValueError:
        return text, 1.0  # not a file, as the check of places says
    if not math.isfinite(value) or value < 0 or (value == 0 and name != SAMPLED):
        raise ValueError(f"{text}: the weight {weight} is not a positive number")
    return name, value


def _check_calibration(text: str) -> None:
    if (name := _weighted(text)[0]) != SAMPLED:
        check_text(name)


def _is_converted(folder: Path) -> bool:
    """Whether a folder holds the result of a conversion: a GDA model, or one with a conversion.json."""
    return config_entry(folder, "model_type", str) == "gda" or (folder / "conversion.json").is_file()
