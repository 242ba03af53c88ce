"""Training a GDA model on text with transformers' Trainer, so that it can be stopped, killed and taken up again."""

import contextlib
import errno
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from gda._errors import CheckFailed, first_line
from gda._files import check_places, refuse_existing
from gda._screen import quiet_transformers
from gda._version import __version__
from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.hub import check_name, require_token
from gda.conversion.push import PushReport, push
from gda.conversion.sources import resolve_folder
from gda.modeling_gda.modeling_gda import GDAForCausalLM

from .anneal import LambdaAnnealCallback
from .data import Windows, collate, open_windows
from .distillation import Distillation
from .growth import GrowthMaskCallback
from .guards import Interrupts, NotFinite, Pace, Shown, Stops, Watched, WholeCheckpoints, peak_memory
from .layer_log import LayerLog
from .model_folder import load, model_stamps, read_config, read_tokenizer, save
from .parameters import choose_what_learns, count_learning, is_adapted, merged, merged_state
from .precision import launcher_wants_bfloat16
from .processes import Processes, on_cpu
from .run_folder import DATA_FOLDER, LOG_FILE, Identity, RunFolder, stamps, step_of
from .settings import TrainSettings
from .trainer import GDATrainer

CONTEXT = 512
# By default, how many losses are told of on the way, and how many checkpoints and measurements are made.
LOSSES, CHECKPOINTS, MEASUREMENTS = 20, 10, 10
# What torch and safetensors say when the disk is full, or a quota: they raise no OSError.
NOT_WRITTEN = re.compile(r"PytorchStreamWriter|inline_container|file write failed|I/O error|os error (27|28|122)")
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
class TrainReport:
    """What training did, or by `dry_run` would do.

    Attributes:
        out: The folder that was made.
        steps: Optimizer steps.
        tokens: Tokens that the model read in them; those of a second pass over the data count again.
        data_tokens: Tokens in the windows that the data fills; None when streaming.
        first_loss: Loss of the first step, nats a token.
        last_loss: Mean loss of the last steps, as many as lie between two entries of the log.
        first_eval_loss: Loss on `eval_data` before the first step; None without.
        last_eval_loss: And after the last.
        num_parameters: Of the model.
        num_trained: Those that could move; of parameters that are new in part, the new entries.
        tokens_per_second: Over all processes, in training steps of the last session; None if it did none.
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
        return _exp(self.first_eval_loss)

    @property
    def last_perplexity(self) -> float | None:
        """exp of the last loss on `eval_data`."""
        return _exp(self.last_eval_loss)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return vars(self) | {
            "out": str(self.out),
            "first_perplexity": self.first_perplexity,
            "last_perplexity": self.last_perplexity,
            "pushed": None if self.pushed is None else self.pushed.to_dict(),
        }


def _exp(loss: float | None) -> float | None:
    try:
        return None if loss is None else math.exp(loss)
    except OverflowError:
        return math.inf


def train(
    model: str | Path,
    out: str | Path,
    *,
    data: str | Path | Sequence[str | Path],
    revision: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    bundle_code: bool = True,
    plot: bool = False,
    push_to_hub: str | None = None,
    private: bool | None = None,
    dry_run: bool = False,
    console: Console | None = None,
    **options: Any,
) -> TrainReport:
    """Train a GDA language model to predict text, by transformers' Trainer.

    Weights are float32 while they learn, whatever their dtype in `model`, which they have again in `out`; λ is float32
    in both. If masked growth is under way in `model` its mask rises to 1 over the steps (`GrowthMaskCallback`), and in
    `out` nothing is masked any more.

    Until it is done the run lives in ``.OUT.partial``, where its checkpoints are. Ctrl-C, or SIGTERM, lets it finish
    the step, write a checkpoint and raise KeyboardInterrupt; a second one stops it at once. `resume` goes on from the
    last whole checkpoint, and ends in the weights of an unbroken run. A checkpoint is a model folder as well.

    `out` appears only when it is whole. It holds model, tokenizer, generation config, licences, the code of the model,
    the trainable.json of `model` if there is one, training.json (settings and report), and training_log.jsonl.

    Under `accelerate launch` or torchrun each process calls this. The main one writes; all return the report.

    Args:
        model: A folder with a GDA language model and its tokenizer, a checkpoint of an earlier run, or a Hub id.
        out: The folder to make.
        data: What to train on; see `TrainSettings`.
        revision: Branch, tag or commit, for a Hub id.
        resume: Go on with the run to `out` that was interrupted, killed or failed. Settings, data and model must be
            the same. If there is none, begin.
        overwrite: Replace `out` if it exists, and without `resume` a run to it that did not end.
        bundle_code: Put the code of the model beside the weights.
        plot: Draw `out`/training.html of the log.
        push_to_hub: A repository to push `out` to when it is there.
        private: Whether that repository is private if it is made.
        dry_run: Check everything, count tokens and steps, write nothing.
        console: Where progress is shown; nowhere if None or no terminal.
        **options: The fields of `TrainSettings`.

    Raises:
        FileNotFoundError, FileExistsError, ValueError, OSError: for bad input, in one line that names the remedy.
        CheckFailed: if a loss, a gradient or a weight is not finite. The last checkpoint stays, and is named.
        KeyboardInterrupt: if the run was stopped.
    """
    settings = TrainSettings(data=_names(data), **{name: _names_of(name, value) for name, value in options.items()})
    out = Path(out)
    if private is not None and push_to_hub is None:
        raise ValueError("--private and --public are about the repository of --push-to-hub, which is not given")
    if push_to_hub is not None:
        check_name(push_to_hub)
    processes = Processes()
    with quiet_transformers():
        source = processes.together(lambda: _source(model, out, revision, settings, overwrite))
        if dry_run:
            return _rehearse(source, out, settings, processes, console)
        if push_to_hub is not None:
            processes.on_main(lambda: require_token(push_to_hub))
        report = _run(
            source,
            out,
            settings,
            processes,
            resume=resume,
            overwrite=overwrite,
            bundle_code=bundle_code,
            console=console,
        )
        if plot:
            processes.on_main(lambda: _draw(out))
        if push_to_hub is not None:
            pushed = processes.on_main(lambda: _push(out, push_to_hub, private, bundle_code, console))
            report = replace(report, pushed=pushed)
    return report


def _names(given: str | Path | Sequence[str | Path]) -> tuple[str, ...]:
    return (str(given),) if isinstance(given, str | Path) else tuple(map(str, given))


def _names_of(option: str, value: Any) -> Any:
    return _names(value) if option in ("eval_data", "report_to") else value


def _source(model: str | Path, out: Path, revision: str | None, settings: TrainSettings, overwrite: bool) -> Path:
    """The local folder of the model; everything is refused that can be before much is read."""
    check_places(model, out)
    for place in (*settings.data, *settings.eval_data):
        check_places(place, out)
    refuse_existing(out, overwrite)
    if revision is not None and Path(model).exists():
        raise ValueError(f"--revision is for a Hub id, and {model} is here")
    for reporter in settings.report_to:
        if find_spec(reporter) is None:
            raise ValueError(f"--report-to {reporter} needs that package; pip install {reporter}")
    source = resolve_folder(model, revision)
    read_config(source)
    return source


# --------------------------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class _Plan:
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


def _plan(source: Path, settings: TrainSettings, processes: Processes, scratch: Path, console: Console | None) -> _Plan:
    config, tokenizer = read_config(source), read_tokenizer(source)
    context = _context(settings, config)

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
    notes = [*read.notes]
    if config.growth_mask is not None:
        notes.append(f"the growth mask rises from {config.growth_mask:g} to 1 over {steps} steps")
    return _Plan(
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


def _context(settings: TrainSettings, config: GDAConfig) -> int:
    longest = config.max_position_embeddings
    if settings.context is not None and settings.context > longest:
        raise ValueError(f"--context {settings.context} is above {longest}, the max_position_embeddings of the model")
    return min(CONTEXT, longest) if settings.context is None else settings.context


def _steps(settings: TrainSettings, windows: int | None, processes: int) -> int:
    """Optimizer steps in all, as the Trainer counts those of an epoch."""
    if settings.steps is not None:
        return settings.steps
    assert windows is not None  # streaming needs --steps
    passes = math.ceil(math.ceil(windows / settings.batch_size) / processes)
    return math.ceil(settings.epochs * math.ceil(passes / settings.accumulation))


def _rehearse(
    source: Path, out: Path, settings: TrainSettings, processes: Processes, console: Console | None
) -> TrainReport:
    """What a run would be; the windows are cut in a folder that is removed again."""
    with contextlib.ExitStack() as stack:
        scratch = processes.on_main(lambda: stack.enter_context(tempfile.TemporaryDirectory(prefix="gda-train-")))
        plan = processes.together(lambda: _plan(source, settings, processes, Path(scratch), console))
    tokens = plan.steps * settings.batch_size * settings.accumulation * processes.count
    if plan.windows.count is not None and settings.steps is None:
        tokens = round(min(tokens, settings.epochs * plan.windows.count))
    return TrainReport(
        out=out,
        steps=plan.steps,
        tokens=tokens * _context(settings, plan.config),
        data_tokens=plan.windows.tokens,
        num_parameters=plan.num_parameters,
        num_trained=plan.num_trained,
        dry_run=True,
        notes=plan.notes,
    )


# ---------------------------------------------------------------------------------------------------------- the run


def _run(
    source: Path,
    out: Path,
    settings: TrainSettings,
    processes: Processes,
    *,
    resume: bool,
    overwrite: bool,
    bundle_code: bool,
    console: Console | None,
) -> TrainReport:
    local = [file for name in (*settings.data, *settings.eval_data) for file in _files(Path(name))]
    identity = Identity(settings, model_stamps(source), stamps(local), processes.count)
    with _folder(out, identity, source, processes, resume=resume, overwrite=overwrite) as run:
        if run.report is not None:
            report = TrainReport(**run.report, out=out)
        else:
            plan = processes.together(lambda: _plan(source, settings, processes, run.path / DATA_FOLDER, console))
            processes.on_main(lambda: _require_space(run.path, plan))
            trainer, pace = _train(plan, run, source, processes, console)
            report = _report(out, plan, trainer, pace, run.checkpoint)
            _write(trainer, plan, source, run.path, processes, bundle_code)
        told = {name: value for name, value in vars(report).items() if name not in ("out", "pushed")}
        made = {"model": source.name, "data": [file.name for file in local], "versions": _versions()}
        processes.on_main(lambda: run.finish(made, told))
    return report


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


@dataclass
class _Place:
    """The run's folder as every process knows it; only the main one may change it."""

    path: Path
    checkpoint: Path | None
    report: dict[str, Any] | None
    folder: RunFolder | None

    def finish(self, made: dict[str, Any], report: dict[str, Any]) -> None:
        assert self.folder is not None  # in the main process
        self.folder.finish(made, report)


@contextlib.contextmanager
def _folder(
    out: Path, identity: Identity, source: Path, processes: Processes, *, resume: bool, overwrite: bool
) -> Iterator[_Place]:
    """The folder of the run; and what is to be said of it where the run fails."""
    folder: RunFolder | None = None

    def begin() -> tuple[Path, Path | None, dict[str, Any] | None]:
        nonlocal folder
        folder = RunFolder(out, identity, source, resume=resume, overwrite=overwrite)
        return folder.path, folder.checkpoint, folder.report

    path, checkpoint, report = processes.on_main(begin)
    try:
        with processes.ended_by_another():
            processes.together(lambda: _require_seen(path, processes))
            yield _Place(path, checkpoint, report, folder)
    except BaseException as error:
        last = folder.leave() if folder is not None else None
        if (said := _said(error, last, path, identity.settings)) is None:
            raise
        if isinstance(error, NotFinite) and not processes.is_main:
            said.told_elsewhere = True  # type: ignore[attr-defined]
        raise said from None


def _require_seen(path: Path, processes: Processes) -> None:
    if not path.is_dir():
        raise FileNotFoundError(f"process {processes.index} does not see {path}; OUT must be where all machines see it")


def _said(error: BaseException, last: Path | None, path: Path, settings: TrainSettings) -> Exception | None:
    """The error to raise instead, which says what is left and what to do; None where it says that already."""
    kept = "nothing was kept" if last is None else f"{last} holds step {step_of(last)}, the last good one"
    if isinstance(error, NotFinite):
        remedy = f"lower --learning-rate {settings.learning_rate:g}, or look into the model by `gda inspect`"
        return CheckFailed(f"{error}: {kept}; {remedy}")
    if isinstance(error, torch.OutOfMemoryError):
        return ValueError(f"{first_line(error)}; lower --batch-size or --context, or pass --gradient-checkpointing")
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
    if full or (isinstance(error, RuntimeError | SafetensorError) and NOT_WRITTEN.search(str(error))):
        reason = error.strerror if full and isinstance(error, OSError) else first_line(error)
        goes_on = "" if last is None else "; make room, and --resume goes on"
        return OSError(f"{path} cannot be written: {reason}: {kept}{goes_on}")
    return None


def _require_space(path: Path, plan: _Plan) -> None:
    """Refuse to begin what a full disk would end: an old and a new checkpoint, weights and AdamW's two moments each."""
    needed = 4 * (plan.num_parameters + 2 * plan.num_trained) * (plan.settings.keep + 1)
    there = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if (free := shutil.disk_usage(path).free + there) < needed:
        raise OSError(
            f"{path.parent} has {free / 1e9:.1f} GB free, but checkpoints need {needed / 1e9:.1f} GB; make room"
        )


class _RunTrainer(Watched, GDATrainer):
    """Our Trainer, watched; and what it has trained."""

    def whole_model(self) -> GDAForCausalLM:
        """The plain model that was trained, on the CPU in the main process; all processes must ask for it."""
        model: Any = self.accelerator.unwrap_model(self.model_wrapped)
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            whole: Any = merged(model)
            return whole.cpu()
        state = self.accelerator.get_state_dict(self.model_wrapped)  # in the main process alone
        if is_adapted(model) and state:
            state = merged_state(model, state)
        with torch.device("meta"):
            plain = GDAForCausalLM(model.config)
        if state:
            plain.load_state_dict(state, assign=True)
        plain.tie_weights()
        return plain


def _train(
    plan: _Plan, run: _Place, source: Path, processes: Processes, console: Console | None
) -> tuple[_RunTrainer, Pace]:
    settings = plan.settings
    shown, pace = Shown(console if processes.is_main else None), Pace()
    dtypes = {name: str(dtype).removeprefix("torch.") for name, dtype in plan.dtypes.items()}
    callbacks: list[TrainerCallback] = [
        WholeCheckpoints(run.path, source, dtypes, settings.keep, processes),
        pace,
        shown,
    ]
    if plan.config.growth_mask is not None:
        callbacks.append(GrowthMaskCallback(num_steps=plan.steps))
    if settings.lambda_target is not None and settings.lambda_anneal_steps is not None:
        callbacks.append(LambdaAnnealCallback(settings.lambda_target, settings.lambda_anneal_steps))
    interrupts = Interrupts(console if processes.is_main else None)
    trainer = _RunTrainer(
        plan.learner,
        _arguments(plan, run),
        train_dataset=plan.windows.rows,
        eval_dataset=None if plan.eval_windows is None else plan.eval_windows.rows,
        data_collator=collate,
        callbacks=callbacks,
        lambda_learning_rate=settings.lambda_learning_rate,
        distillation=plan.distillation,
        layer_log=LayerLog(run.path / LOG_FILE if processes.is_main else None),
        interrupts=interrupts,
        processes=processes,
    )
    trainer.remove_callback(PrinterCallback)  # prints what is logged
    stops = Stops(trainer)
    trainer.add_callback(stops)
    try:
        with interrupts.watched(), contextlib.redirect_stdout(sys.stderr):
            trainer.train(resume_from_checkpoint=None if run.checkpoint is None else str(run.checkpoint))
    finally:
        shown.close()
    if stops.interrupted:
        raise KeyboardInterrupt
    return trainer, pace


def _arguments(plan: _Plan, run: _Place) -> TrainingArguments:
    settings = plan.settings
    warmup = min(plan.steps, round(settings.warmup * plan.steps))
    decay = min(plan.steps - warmup, round(settings.decay * plan.steps))
    checkpointing: dict[str, Any] = {CHECKPOINTING: settings.gradient_checkpointing}
    arguments = TrainingArguments(
        output_dir=str(run.path),
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
        eval_on_start=plan.eval_windows is not None and run.checkpoint is None,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=plan.save_every,
        include_num_input_tokens_seen="all",
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu(),
        disable_tqdm=True,
        report_to=list(settings.report_to) or "none",
    )
    arguments.mixed_precision = "bf16" if plan.computes_in_bfloat16 else "no"  # the launcher's would be taken otherwise
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process drives one device; `accelerate launch` starts one for each
    return arguments


def _report(out: Path, plan: _Plan, trainer: _RunTrainer, pace: Pace, checkpoint: Path | None) -> TrainReport:
    state: TrainerState = trainer.state
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    measured = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    notes = list(plan.notes)
    if state.global_step < plan.steps:
        notes.append(f"the data ended at step {state.global_step} of {plan.steps}")
    return TrainReport(
        out=out,
        steps=state.global_step,
        tokens=int(state.num_input_tokens_seen),
        data_tokens=plan.windows.tokens,
        num_parameters=plan.num_parameters,
        num_trained=plan.num_trained,
        first_loss=losses[0],
        last_loss=losses[-1],
        first_eval_loss=measured[0] if measured else None,
        last_eval_loss=measured[-1] if measured else None,
        tokens_per_second=pace.tokens_per_second,
        peak_memory=peak_memory(trainer.args.device),
        resumed_from=None if checkpoint is None else step_of(checkpoint),
        notes=notes,
    )


def _write(
    trainer: _RunTrainer, plan: _Plan, source: Path, folder: Path, processes: Processes, bundle_code: bool
) -> None:
    """Write the model into the run's folder, beside its checkpoints."""
    model = trainer.whole_model()

    def write() -> None:
        model.config.use_cache = plan.config.use_cache  # the Trainer switches it off
        save(model, plan.dtypes, source, folder, bundle_code=bundle_code)

    processes.on_main(write)


def _versions() -> dict[str, str]:
    return {"gda": __version__} | {name: version(name) for name in ("torch", "transformers", "accelerate")}


# --------------------------------------------------------------------------------------------------------- afterwards


def _draw(out: Path) -> None:
    from .plot import plot

    plot(out)


def _push(out: Path, repo: str, private: bool | None, bundle_code: bool, console: Console | None) -> PushReport:
    try:
        return push(out, repo, private=private, bundle_code=bundle_code, console=console)
    except (ConnectionError, PermissionError, ValueError) as error:
        raise type(error)(f"{error}; {out} is whole: `gda push {out} {repo}` goes on") from None
