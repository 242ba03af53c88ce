"""The plan of a run before its first step: model, data, number of steps and the Trainer's arguments."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerCallback, TrainingArguments

from gda.common.files import partial_of, require_space
from gda.configuration.configuration_gda import MASKED, GDAConfig
from gda.conversion.sources.config_file import read_gda_config
from gda.conversion.sources.tokenizers import read_tokenizer
from gda.training.callbacks.fading import FadeCallback
from gda.training.data.sequences import Sequences, open_sequences
from gda.training.distillation import Distillation
from gda.training.parameters import choose_what_learns, count_learning, is_lambda
from gda.training.runs.model_folder import load
from gda.training.runs.processes import Processes, auto_is_bfloat16, on_cpu
from gda.training.runs.run_folder import DATA_FOLDER, NEW_DATA
from gda.training.settings import EVAL_TOKENS, TrainSettings

CONTEXT = 512
# Default numbers of log entries, checkpoints and measurements in a run.
LOG_ENTRIES, CHECKPOINTS, MEASUREMENTS = 20, 10, 10
# The name of gradient checkpointing in TrainingArguments: releases with the new name warn about the old one.
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
    learner: Any  # the model, or PEFT's model around it
    dtypes: dict[str, torch.dtype]  # by parameter, before training
    sequences: Sequences
    eval_sequences: Sequences | None
    distillation: Distillation | None
    steps: int
    num_parameters: int
    num_trained: int
    notes: list[str]

    @property
    def computes_in_bfloat16(self) -> bool:
        """Whether matrix products are computed in bfloat16."""
        if self.settings.precision != "auto":
            return self.settings.precision == "bfloat16"
        return auto_is_bfloat16(self.dtypes.values())

    @property
    def save_every(self) -> int:
        """Steps between checkpoints."""
        return self.settings.save_every or max(1, self.steps // CHECKPOINTS)

    def fade_callbacks(self) -> list[TrainerCallback]:
        """The callback that fades new parts or λ in, if these settings ask for it or an earlier run started it."""
        if self.config.fade is None and self.settings.lambda_target is None:
            return []
        return [FadeCallback(self.settings.fade_steps or self.steps, self.settings.lambda_target)]

    def require_space(self, out: Path) -> None:
        """Raise NoSpaceError unless the disk of `out` has room for the checkpoints.

        A new checkpoint is written before an old one is removed. Each holds the weights and AdamW's two moments,
        which all entries of a partly trained parameter have.
        """
        learning = sum(each.numel() for each in self.learner.parameters() if each.requires_grad)
        kept = min(self.settings.keep, (self.steps - 1) // self.save_every)  # the last step writes OUT
        needed = 4 * (self.num_parameters + 2 * learning) * (kept + 1)
        place = next(path for path in (out.parent, *out.absolute().parents) if path.is_dir())
        left = [file for file in partial_of(out).rglob("*") if file.is_file()]
        reusable = sum(file.stat().st_size for file in left if file.parent.name not in (DATA_FOLDER, NEW_DATA))
        require_space(place, needed, reusable=reusable, what="a run with checkpoints")


def make_plan(
    source: Path,
    settings: TrainSettings,
    processes: Processes,
    scratch: Path,
    console: Console | None,
    *,
    resumes: bool = False,
) -> Plan:
    """Load the model and the teacher, and tokenize the data, which must be the same for a run that `resumes`.

    Bad input is refused before the data is tokenized into `scratch`, which can take hours.

    Raises:
        FileNotFoundError, ValueError, ImportError: naming what is wrong, and the remedy.
    """
    config, tokenizer = read_gda_config(source), read_tokenizer(source)
    context = context_of(settings, config)
    _check_fade(settings, config)
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
            context=context,
        )
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    learner = choose_what_learns(model, settings.train, source, settings.lora_rank, seed=settings.seed)
    learns_lambda = any(is_lambda(name) and each.requires_grad for name, each in learner.named_parameters())
    if settings.lambda_learning_rate is not None and not learns_lambda:
        raise ValueError(f"--lambda-learning-rate {settings.lambda_learning_rate:g} has no effect: no λ is trained")

    open_data = partial(
        open_sequences,
        tokenizer=tokenizer,
        context=context,
        text_field=settings.text_field,
        seed=settings.seed,
        vocab_size=config.vocab_size,
        scratch=scratch,
        resumes=resumes,
        console=console,
    )
    sequences = open_data(settings.data, streaming=settings.streaming)
    eval_sequences, notes = None, [*sequences.notes]
    if settings.eval_data:
        eval_sequences = open_data(settings.eval_data, streaming=False, option="--eval-data")
        eval_sequences = eval_sequences.spread(max(1, (settings.eval_tokens or EVAL_TOKENS) // context))
        notes += eval_sequences.notes
    steps = _count_steps(settings, sequences, processes.count)
    if config.fade is not None:
        notes += [f"the fade of the model rises from {config.fade:g} to 1 over {settings.fade_steps or steps} steps"]
    return Plan(
        settings=settings,
        config=config,
        learner=learner,
        dtypes=dtypes,
        sequences=sequences,
        eval_sequences=eval_sequences,
        distillation=distillation,
        steps=steps,
        num_parameters=num_parameters,
        num_trained=count_learning(learner),
        notes=notes,
    )


def context_of(settings: TrainSettings, config: GDAConfig) -> int:
    """Tokens per sequence, which must not be more than the model reads."""
    longest = config.max_position_embeddings
    settings.check_context(longest)
    return min(CONTEXT, longest) if settings.context is None else settings.context


def _check_fade(settings: TrainSettings, config: GDAConfig) -> None:
    wanted, current = settings.lambda_target, config.lambda_target
    if settings.fade_steps is not None and config.fade is None and wanted is None:
        raise ValueError(f"--fade-steps {settings.fade_steps} has no effect: nothing in the model is faded in")
    # New parts have random weights, except layers that are blended in.
    frozen = {"attention": ("masked_neurons", "masked_layers"), "lora": MASKED}.get(settings.train, ())
    if new := [
        name for name in frozen if getattr(config, name) and not (name == "masked_layers" and config.blended_layers)
    ]:
        raise ValueError(f"--train {settings.train} would not train new parts that fade in ({new[0]}); use --train new")
    if config.fade and wanted not in (None, current):
        remedy = "omit the option" if current is None else f"pass {current:g}"
        raise ValueError(f"--lambda-target {wanted}: the model is at fade {config.fade:g}, and λ would jump; {remedy}")


def _count_steps(settings: TrainSettings, sequences: Sequences, processes: int) -> int:
    steps = settings.steps
    if steps is None:
        assert sequences.count is not None  # a stream needs --steps
        steps = math.ceil(settings.epochs * steps_per_epoch(settings, sequences.count, processes))
    settings.check_fade(steps)
    return steps


def steps_per_epoch(settings: TrainSettings, sequences: int, processes: int) -> int:
    """Optimizer steps of one pass over the data, as the Trainer counts them. The last one may read less."""
    batches = math.ceil(math.ceil(sequences / settings.batch_size) / processes)
    return math.ceil(batches / settings.accumulation)


def eval_batch_size(batch_size: int, sequences: int, processes: int) -> int:
    """Sequences in a batch of an evaluation, at most `batch_size`.

    With several processes, accelerate fills an incomplete batch with sequences that it repeats, and they would count
    twice. So the batch divides the number of sequences.
    """
    if processes == 1:
        return batch_size
    return next(each for each in range(batch_size, 0, -1) if sequences % each == 0)


def training_arguments(
    plan: Plan, folder: Path, processes: int, *, resumes: bool, shows_progress: bool
) -> TrainingArguments:
    """The Trainer's arguments for a plan, with checkpoints in `folder`."""
    settings = plan.settings
    warmup = min(plan.steps, round(settings.warmup * plan.steps))
    decay = min(plan.steps - warmup, round(settings.decay * plan.steps))
    eval_count = (plan.eval_sequences and plan.eval_sequences.count) or 0
    checkpointing: dict[str, Any] = {CHECKPOINTING: settings.gradient_checkpointing}
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=plan.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=eval_batch_size(settings.batch_size, eval_count, processes),
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
        logging_steps=settings.log_every or max(1, plan.steps // LOG_ENTRIES),
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="no" if plan.eval_sequences is None else "steps",
        eval_steps=settings.eval_every or max(1, plan.steps // MEASUREMENTS),
        eval_on_start=plan.eval_sequences is not None and not resumes,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=plan.save_every,
        include_num_input_tokens_seen="all",
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu(),
        ddp_find_unused_parameters=False,  # every trained parameter is used in each step
        disable_tqdm=not shows_progress,
        report_to=list(settings.report_to) or "none",
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process uses one device; `accelerate launch` starts one for each
    return arguments
