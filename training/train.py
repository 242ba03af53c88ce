"""Training a GDA model on text with transformers' Trainer: all of it, or what growth has added."""

import contextlib
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from gda._assets import copy_assets
from gda._errors import CheckFailed, first_line
from gda._files import StagedFolder, check_places, read_json, refuse_existing
from gda._screen import quiet_transformers, shows_progress
from gda._text import read_text
from gda._trainable import TRAINABLE_FILE, Trainable
from gda.configuration.configuration_gda import GDAConfig
from gda.modeling_gda.modeling_gda import GDAForCausalLM

from .growth import GrowthMaskCallback

CONTEXT = 512
# Losses that are told of on the way.
LOSSES = 20


@dataclass(frozen=True)
class TrainReport:
    """What training did.

    Attributes:
        out: The folder that was made.
        steps: Optimizer steps.
        tokens: Tokens that the model read in them; those of a second pass over the data count again.
        data_tokens: Tokens in the windows that the data fills.
        first_loss: Loss of the first step, nats a token.
        last_loss: Mean loss of the last steps, the last twentieth or so.
        num_parameters: Of the model.
        num_trained: Those that could move; of parameters that are new in part, the new entries.
        notes: What else one should know.
    """

    out: Path
    steps: int
    tokens: int
    data_tokens: int
    first_loss: float
    last_loss: float
    num_parameters: int
    num_trained: int
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return vars(self) | {"out": str(self.out)}


def train(
    model: str | Path,
    out: str | Path,
    *,
    data: str | Path,
    only_new: bool = False,
    steps: int | None = None,
    learning_rate: float = 1e-4,
    batch_size: int = 8,
    context: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    bundle_code: bool = True,
    console: Console | None = None,
) -> TrainReport:
    """Train a GDA language model to predict text, by transformers' Trainer.

    AdamW without weight decay, of λ, norms and all else; the learning rate falls to 0 in a straight line; gradients are
    clipped to a norm of 1. Weights are float32 while they learn, whatever their dtype in `model`, which they have again
    in `out`; λ is float32 in both. On a GPU that has it, a bfloat16 model computes in bfloat16.

    If masked growth is under way in `model` its mask rises to 1 over the steps (`GrowthMaskCallback`), and in `out`
    nothing is masked any more.

    `out` appears only when it is whole. It holds model, tokenizer, generation config, licences, the code of the model,
    and the trainable.json of `model` if there is one.

    Args:
        model: A folder with a GDA language model and its tokenizer.
        out: The folder to make.
        data: A text file, or `.jsonl` with a field `text` in each line; lines are parted by blank ones. It is cut into
            windows of `context` tokens, which are read in random order; the tokens at its end that fill none are not
            read.
        only_new: Let only what trainable.json of `model` calls new learn. All else keeps its values bit for bit, also
            the old entries of a parameter that is new in part.
        steps: Optimizer steps; by default once through the data.
        learning_rate: That of the first step.
        batch_size: Windows a step.
        context: Tokens a window; by default 512, or what the model was made for if that is less.
        seed: Of the order of windows, and of dropout if the model has any.
        overwrite: Replace `out` if it exists.
        bundle_code: Put the code of the model beside the weights.
        console: Where progress is shown; nowhere if None or no terminal.

    Raises:
        FileNotFoundError, FileExistsError, ValueError, OSError: for bad input, in one line that names the remedy.
        CheckFailed: if a loss or a weight is not finite; `out` is then not made.
    """
    _check_settings(steps=steps, learning_rate=learning_rate, batch_size=batch_size, context=context, seed=seed)
    check_places(model, out)
    check_places(data, out)
    model, out = Path(model), Path(out)
    refuse_existing(out, overwrite)
    config = _read_config(model)
    trainable = Trainable.read(model) if only_new else None
    with quiet_transformers(), _staged(out, overwrite) as folder:
        windows = _windows(Path(data), _read_tokenizer(model), config, context)
        learner, dtypes = _load(model)
        num_trained = _choose_what_learns(learner, trainable)
        steps = math.ceil(len(windows) / batch_size) if steps is None else steps
        notes = _notes(config, steps)
        state = _run(
            learner,
            windows,
            narrow=torch.bfloat16 in dtypes.values(),
            steps=steps,
            learning_rate=learning_rate,
            batch_size=batch_size,
            seed=seed,
            console=console,
        )
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        _require_finite(learner, losses, state.global_step, learning_rate)
        learner.config.use_cache = config.use_cache  # the Trainer switches it off
        _save(learner, dtypes, model, folder, bundle_code)
    return TrainReport(
        out=out,
        steps=state.global_step,
        tokens=int(state.num_input_tokens_seen),
        data_tokens=windows.numel(),
        first_loss=losses[0],
        last_loss=losses[-1],
        num_parameters=sum(parameter.numel() for parameter in learner.parameters()),
        num_trained=num_trained,
        notes=notes,
    )


def _check_settings(
    *, steps: int | None, learning_rate: float, batch_size: int, context: int | None, seed: int
) -> None:
    for option, value, least in (("--steps", steps, 1), ("--batch-size", batch_size, 1), ("--context", context, 2)):
        if value is not None and value < least:
            raise ValueError(f"{option} {value} is below {least}")
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise ValueError(f"--learning-rate {learning_rate} is no positive number, such as 1e-4")
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed {seed} is not from 0 to {2**32 - 1}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("gda train runs in one process, and WORLD_SIZE says that there are several; start one")


@contextlib.contextmanager
def _staged(out: Path, overwrite: bool) -> Iterator[Path]:
    staged = StagedFolder(out, overwrite=overwrite)
    try:
        yield staged.folder
        staged.finish()
    except BaseException:
        staged.discard()
        raise


def _read_config(folder: Path) -> GDAConfig:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; name one that holds a GDA model")
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a model folder holds one")
    raw = read_json(path)
    model_type = raw.get("model_type") if isinstance(raw, dict) else None
    if model_type != "gda":
        raise ValueError(f"{path} has model_type {model_type!r}; `gda convert` makes a GDA model of a Llama")
    if (kinds := raw.get("architectures") or ["GDAForCausalLM"]) != ["GDAForCausalLM"]:
        raise ValueError(f"{path} describes {kinds}, no language model; architectures must be ['GDAForCausalLM']")
    if raw.get("quantization_config") is not None:
        raise ValueError(f"{path} has a quantization_config; dequantize the model and save it first")
    try:
        return GDAConfig.from_pretrained(folder)
    except Exception as error:  # whatever a malformed file makes the config class raise
        raise ValueError(f"{path} is not a valid configuration: {first_line(error)}") from None


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers has no common error for it
        raise ValueError(f"{folder} holds no tokenizer that can be loaded: {first_line(error)}") from None


def _windows(path: Path, tokenizer: PreTrainedTokenizerBase, config: GDAConfig, context: int | None) -> Tensor:
    """Ids (windows, context) of the text in `path`, in its order."""
    longest = config.max_position_embeddings
    if context is not None and context > longest:
        raise ValueError(f"--context {context} is above {longest}, the max_position_embeddings of the model")
    context = min(CONTEXT, longest) if context is None else context
    _, text = read_text(path, "--data")
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    count = len(ids) // context
    if count == 0:
        raise ValueError(f"{path} has {len(ids)} tokens, less than a window of {context}; lower --context or add text")
    windows = torch.tensor(ids[: count * context]).view(count, context)
    if int(windows.max()) >= config.vocab_size:
        raise ValueError(
            f"the tokenizer gives ids up to {windows.max()}, and the model has {config.vocab_size} embeddings"
        )
    return windows


def _load(folder: Path) -> tuple[GDAForCausalLM, dict[str, torch.dtype]]:
    """The model in float32, for small steps are lost on narrow weights, and the dtypes that its parameters had."""
    try:
        loaded: Any = GDAForCausalLM.from_pretrained(
            folder, dtype="auto", use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # whatever a malformed folder makes transformers raise
        raise ValueError(f"{folder} cannot be loaded: {first_line(error)}") from None
    model, loading = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, loading[kind])):
            raise ValueError(f"{folder}: weights and config.json do not fit, {kind.replace('_', ' ')}: {names[0]}")
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    return model.float(), dtypes


def _choose_what_learns(model: GDAForCausalLM, trainable: Trainable | None) -> int:
    """Freeze what is not to learn; return the number of weights that are."""
    if trainable is None:
        return sum(parameter.numel() for parameter in model.parameters())
    trainable.freeze_others(model, whole=False)
    new = (trainable.new_entries(name, parameter) for name, parameter in model.named_parameters())
    return sum(int(each.sum()) for each in new if each is not None)


def _notes(config: GDAConfig, steps: int) -> list[str]:
    if config.growth_mask is None:
        return []
    return [f"the growth mask rose from {config.growth_mask:g} to 1 over {steps} steps; nothing is masked any more"]


class _Losses(TrainerCallback):
    """Has the last loss told of too, and ends training that has come to nothing."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_log |= state.global_step >= state.max_steps

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not math.isfinite(state.log_history[-1].get("loss", 0.0)):
            control.should_training_stop = True


def _run(
    model: GDAForCausalLM,
    windows: Tensor,
    *,
    narrow: bool,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    console: Console | None,
) -> TrainerState:
    callbacks: list[TrainerCallback] = [_Losses()]
    if model.config.growth_mask is not None:
        callbacks.append(GrowthMaskCallback(num_steps=steps))
    with tempfile.TemporaryDirectory(prefix="gda-train-") as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            weight_decay=0.0,
            seed=seed,
            bf16=narrow and torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
            save_strategy="no",
            report_to="none",
            logging_steps=max(1, steps // LOSSES),
            logging_first_step=True,
            logging_nan_inf_filter=False,
            include_num_input_tokens_seen="all",
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=not shows_progress(console),
        )
        dataset: Any = [{"input_ids": window, "labels": window} for window in windows]
        trainer = Trainer(model, arguments, train_dataset=dataset, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)  # prints losses where there is no bar
        try:
            with contextlib.redirect_stdout(sys.stderr):  # the bar writes losses to standard output
                trainer.train()
        except torch.OutOfMemoryError as error:
            raise ValueError(f"{first_line(error)}; lower --batch-size or --context") from None
        return trainer.state


def _require_finite(model: GDAForCausalLM, losses: list[float], step: int, learning_rate: float) -> None:
    """
    Raises:
        CheckFailed: if a loss or a weight is not finite.
    """
    remedy = f"nothing was written; lower --learning-rate {learning_rate:g}, or look into the model by `gda inspect`"
    if not all(map(math.isfinite, losses)):
        raise CheckFailed(f"the loss was {losses[-1]} by step {step}: {remedy}")
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise CheckFailed(f"{name} is not finite after step {step}: {remedy}")


def _save(model: GDAForCausalLM, dtypes: dict[str, torch.dtype], source: Path, folder: Path, bundle_code: bool) -> None:
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    model.generation_config = GenerationConfig.from_model_config(model.config)  # that of the source replaces it
    model.save_pretrained(folder)
    if not bundle_code:
        for code in folder.glob("*.py"):
            code.unlink()
        model.config.save_pretrained(folder, bundle_code=False)
    copy_assets(source, folder)
    if (source / TRAINABLE_FILE).is_file():
        shutil.copyfile(source / TRAINABLE_FILE, folder / TRAINABLE_FILE)
