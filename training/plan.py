"""What a run will do, known before its first step: data, model, steps, and what the Trainer is told."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerCallback, TrainingArguments

from gda.configuration.configuration_gda import GDAConfig
from gda.training.callbacks.fading import FadeCallback
from gda.training.data.sequences import Windows, open_windows
from gda.training.distillation import Distillation
from gda.training.parameters import choose_what_learns, count_learning
from gda.training.precision import launcher_wants_bfloat16
from gda.training.runs.model_folder import load, read_config, read_tokenizer
from gda.training.runs.processes import Processes, on_cpu
from gda.training.settings import TrainSettings

CONTEXT = 512
# By default, how many losses are told of on the way, and how many checkpoints and measurements are made.
LOSSES, CHECKPOINTS, MEASUREMENTS = 20, 10, 10
# Its new name in the Trainer; the old one warns there.
CHECKPOINTING = "activation_checkpointing"
if CHECKPOINTING not in TrainingArguments.__dataclass_fields__:
    CHECKPOINTING = "gradient_checkpointing"
SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "wsd": "warmup_stable_decay",
    "constant": "constant_with_warmup",
}


@dataclass(frozen=True)
class Plan:
    """What is known before the first step."""

    settings: TrainSettings
    config: GDAConfig
    learner: Any  # the model, or what PEFT has made around it
    dtypes: dict[str, torch.dtype]
    windows: Windows
    eval_windows: Windows | None
    distillation: Distillation | None
    steps: int
    num_parameters: int
    num_trained: int
    notes: list[str]

    @property
    def log_every(self) -> int:
        return self.settings.log_every or max(1, self.steps // LOSSES)

    @property
    def eval_every(self) -> int:
        return self.settings.eval_every or max(1, self.steps // MEASUREMENTS)

    @property
    def save_every(self) -> int:
        return self.settings.save_every or max(1, self.steps // CHECKPOINTS)

    @property
    def computes_in_bfloat16(self) -> bool:
        """Whether matrices are multiplied in bfloat16."""
        if self.settings.precision != "auto":
            return self.settings.precision == "bfloat16"
        if launcher_wants_bfloat16():
            return True
        fast = not on_cpu() and torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return fast and torch.bfloat16 in self.dtypes.values()

    @property
    def fade_steps(self) -> int:
        """Steps over which new parts or λ are faded in."""
        return self.settings.lambda_anneal_steps or self.steps

    def fade_callbacks(self) -> list[TrainerCallback]:
        """The callback that fades new parts or λ in, if these settings ask for it or an earlier run began it."""
        if self.config.fade is None and self.settings.lambda_target is None:
            return []
        return [FadeCallback(self.fade_steps, self.settings.lambda_target)]


def make_plan(
    source: Path, settings: TrainSettings, processes: Processes, scratch: Path, console: Console | None
) -> Plan:
    config, tokenizer = read_config(source), read_tokenizer(source)
    context = context_of(settings, config)
    _require_same_target(settings, config)
    # All that may be refused comes before the data, which may take hours to be tokenized.
    model, dtypes = load(source)
    distillation = None
    if settings.teacher is not None:
        distillation = Distillation.load(
            settings.teacher,
            model,
            weight=settings.distill_weight,
            temperature=settings.temperature,
            hidden_weight=settings.hidden_weight,
            tokenizer=tokenizer,
        )
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    learner = choose_what_learns(model, settings.train, source, settings.lora_rank, seed=settings.seed)

    def windows(names: tuple[str, ...], option: str) -> Windows:
        return open_windows(
            names,
            tokenizer,
            context=context,
            text_field=settings.text_field,
            streaming=settings.streaming and option == "--data",
            seed=settings.seed,
            vocab_size=config.vocab_size,
            scratch=scratch,
            option=option,
            console=console,
        )

    read = windows(settings.data, "--data")
    measured = windows(settings.eval_data, "--eval-data") if settings.eval_data else None
    steps = _steps(settings, read.count, processes.count)
    if settings.lambda_anneal_steps is not None and settings.lambda_anneal_steps > steps:
        raise ValueError(
            f"--lambda-anneal-steps {settings.lambda_anneal_steps} is above the {steps} steps of this run: "
            "λ would not be its own at the end"
        )
    notes = [*read.notes]
    if config.fade is not None:
        over = settings.lambda_anneal_steps or steps
        notes.append(f"the fade of the model rises from {config.fade:g} to 1 over {over} steps")
    return Plan(
        settings=settings,
        config=config,
        learner=learner,
        dtypes=dtypes,
        windows=read,
        eval_windows=measured,
        distillation=distillation,
        steps=steps,
        num_parameters=num_parameters,
        num_trained=count_learning(learner),
        notes=notes,
    )


def context_of(settings: TrainSettings, config: GDAConfig) -> int:
    """Tokens a window.

    Raises:
        ValueError: if the model reads fewer.
    """
    longest = config.max_position_embeddings
    if settings.context is not None and settings.context > longest:
        raise ValueError(f"--context {settings.context} is above {longest}, the max_position_embeddings of the model")
    return min(CONTEXT, longest) if settings.context is None else settings.context


def _require_same_target(settings: TrainSettings, config: GDAConfig) -> None:
    wanted, held = settings.lambda_target, config.lambda_target
    if config.fade and wanted not in (None, held):
        remedy = "omit the option" if held is None else f"pass {held:g}"
        raise ValueError(f"--lambda-target {wanted}: the model is at fade {config.fade:g}, and λ would jump; {remedy}")


def _steps(settings: TrainSettings, windows: int | None, processes: int) -> int:
    """Optimizer steps in all, as the Trainer counts those of an epoch."""
    if settings.steps is not None:
        return settings.steps
    assert windows is not None  # streaming needs --steps
    return math.ceil(settings.epochs * steps_of_a_pass(settings, windows, processes))


def steps_of_a_pass(settings: TrainSettings, windows: int, processes: int) -> int:
    """Optimizer steps in which the data is read once; the last may read less than the others."""
    batches = math.ceil(math.ceil(windows / settings.batch_size) / processes)
    return math.ceil(batches / settings.accumulation)


def arguments_of(plan: Plan, folder: Path, *, begins: bool) -> TrainingArguments:
    """What the Trainer is told.

    Args:
        plan: What is to be done.
        folder: Where checkpoints go.
        begins: Whether no checkpoint is gone on from.
    """
    settings = plan.settings
    warmup = min(plan.steps, round(settings.warmup * plan.steps))
    decay = min(plan.steps - warmup, round(settings.decay * plan.steps))
    checkpointing: dict[str, Any] = {CHECKPOINTING: settings.gradient_checkpointing}
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=plan.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        lr_scheduler_type=SCHEDULES[settings.schedule],
        lr_scheduler_kwargs={"num_decay_steps": decay} if settings.schedule == "wsd" else None,
        warmup_steps=warmup,
        seed=settings.seed,
        data_seed=settings.seed,
        bf16=plan.computes_in_bfloat16,
        use_cpu=on_cpu(),
        **checkpointing,
        logging_steps=plan.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="no" if plan.eval_windows is None else "steps",
        eval_steps=plan.eval_every,
        eval_on_start=plan.eval_windows is not None and begins,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=plan.save_every,
        include_num_input_tokens_seen="all",
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu(),
        ddp_find_unused_parameters=False,  # all that learns is used in each step
        disable_tqdm=True,
        report_to=list(settings.report_to) or "none",
    )
    arguments.mixed_precision = "bf16" if plan.computes_in_bfloat16 else "no"  # the launcher's would be taken otherwise
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process drives one device; `accelerate launch` starts one for each
    return arguments
