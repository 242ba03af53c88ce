"""Training a GDA model on text with transformers' Trainer, so that it can be stopped, killed and taken up again."""

import contextlib
import errno
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
)
from transformers.integrations import INTEGRATION_TO_CALLBACK

from gda._version import __version__
from gda.common.errors import CheckFailed, first_line
from gda.common.files import check_places, partial_of, refuse_existing
from gda.common.numbers import finite
from gda.common.screen import quiet_transformers
from gda.conversion.push import PushReport, push
from gda.conversion.sources.hub import check_name, require_token
from gda.conversion.sources.open import resolve_folder
from gda.modeling_gda.modeling_gda import GDAForCausalLM
from gda.training.callbacks.guards import Interrupts, NotFinite, Shown, Stops, Watched, WholeCheckpoints, peak_memory
from gda.training.callbacks.layer_log import LayerLog
from gda.training.data.sequences import collate
from gda.training.parameters import is_adapted, merged, merged_state
from gda.training.plan import Plan, arguments_of, context_of, make_plan, steps_of_a_pass
from gda.training.report import TrainReport
from gda.training.runs.model_folder import model_stamps, read_config, save
from gda.training.runs.processes import Processes
from gda.training.runs.resuming import Resumed, require_state
from gda.training.runs.run_folder import DATA_FOLDER, LOG_FILE, Identity, RunFolder, begun_run, stamps, step_of
from gda.training.settings import TrainSettings
from gda.training.trainer import GDATrainer

# What torch and safetensors say when the disk is full, or a quota: they raise no OSError.
NOT_WRITTEN = re.compile(r"PytorchStreamWriter|inline_container|file write failed|I/O error|os error (27|28|122)")


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
    in both. If `model` is in masked growth, its new parts are faded in over the steps (`FadeCallback`), and `out` is an
    ordinary model.

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
    settings = TrainSettings(data=_names(data), **{name: _plain(name, value) for name, value in options.items()})
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


def _names(given: str | Path | Sequence[str | Path] | None) -> tuple[str, ...]:
    return (str(given),) if isinstance(given, str | Path) else tuple(map(str, given or ()))


def _plain(option: str, value: Any) -> Any:
    """The value as settings hold it: no path, no list, no None for nothing."""
    if option in ("eval_data", "report_to"):
        return _names(value)
    return str(value) if isinstance(value, Path) else value


def _source(model: str | Path, out: Path, revision: str | None, settings: TrainSettings, overwrite: bool) -> Path:
    """The local folder of the model; everything is refused that can be before much is read."""
    check_places(model, out)
    for place in (*settings.data, *settings.eval_data):
        check_places(place, out)
    refuse_existing(out, overwrite)
    if revision is not None and Path(model).exists():
        raise ValueError(f"--revision is for a Hub id, and {model} is here")
    for reporter in settings.report_to:
        if reporter not in INTEGRATION_TO_CALLBACK:
            raise ValueError(f"--report-to {reporter!r} is no reporter; tensorboard, trackio and wandb are some")
        if find_spec(reporter) is None:
            raise ValueError(f"--report-to {reporter} needs that package; pip install {reporter}")
    source = resolve_folder(model, revision)
    read_config(source)
    return source


def _rehearse(
    source: Path, out: Path, settings: TrainSettings, processes: Processes, console: Console | None
) -> TrainReport:
    """What a run would be; the windows are cut in a folder that is removed again."""
    with contextlib.ExitStack() as stack:
        scratch = processes.on_main(lambda: stack.enter_context(tempfile.TemporaryDirectory(prefix="gda-train-")))
        plan = processes.together(lambda: make_plan(source, settings, processes, Path(scratch), console))
    passes, rest = 0, plan.steps
    if plan.windows.count is not None:
        passes, rest = divmod(plan.steps, steps_of_a_pass(settings, plan.windows.count, processes.count))
    windows = passes * (plan.windows.count or 0) + rest * settings.batch_size * settings.accumulation * processes.count
    return TrainReport(
        out=out,
        steps=plan.steps,
        tokens=windows * context_of(settings, plan.config),
        data_tokens=plan.windows.tokens,
        num_parameters=plan.num_parameters,
        num_trained=plan.num_trained,
        dry_run=True,
        notes=[*plan.notes, *filter(None, (begun_run(out), _missing_space(out, plan)))],
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
    identity = Identity(settings, model_stamps(source), _teacher_stamps(settings), stamps(local), processes.count)
    with _folder(out, identity, source, processes, resume=resume, overwrite=overwrite) as run:
        if run.report is not None:
            report = TrainReport.read(run.report, out, run.path)
        else:
            plan = processes.together(lambda: make_plan(source, settings, processes, run.path / DATA_FOLDER, console))
            processes.on_main(lambda: _require_space(out, plan))
            trainer = _train(plan, run, source, processes, console)
            report = _report(out, plan, trainer, run.checkpoint)
            _write(trainer, plan, source, run.path, processes, bundle_code)
        told = {name: finite(value) for name, value in vars(report).items() if name not in ("out", "pushed")}
        made = {"model": source.name, "data": [file.name for file in local], "versions": _versions()}
        processes.on_main(lambda: run.finish(made, told))
    return report


def _teacher_stamps(settings: TrainSettings) -> list[list[Any]]:
    teacher = Path(settings.teacher or "")
    return stamps([teacher]) if teacher.is_file() else model_stamps(teacher) if settings.teacher else []


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


def _require_space(out: Path, plan: Plan) -> None:
    """Refuse to begin what a full disk would end."""
    if (missing := _missing_space(out, plan)) is not None:
        raise OSError(missing)


def _missing_space(out: Path, plan: Plan) -> str | None:
    """What there is not room for: an old and a new checkpoint, weights and AdamW's two moments each."""
    needed = 4 * (plan.num_parameters + 2 * plan.num_trained) * (plan.settings.keep + 1)
    place = next(path for path in (out.parent, *out.absolute().parents) if path.is_dir())
    left_over = sum(file.stat().st_size for file in partial_of(out).rglob("*") if file.is_file())
    if (free := shutil.disk_usage(place).free + left_over) >= needed:
        return None
    return f"{place} has {free / 1e9:.1f} GB free, but checkpoints need {needed / 1e9:.1f} GB; make room"


class _RunTrainer(Watched, Resumed, GDATrainer):
    """Our Trainer, watched, and careful with what it goes on from; and what it has trained."""

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


def _train(plan: Plan, run: _Place, source: Path, processes: Processes, console: Console | None) -> _RunTrainer:
    settings = plan.settings
    if run.checkpoint is not None:
        require_state(run.checkpoint)
    shown = Shown(console if processes.is_main else None)
    dtypes = {name: str(dtype).removeprefix("torch.") for name, dtype in plan.dtypes.items()}
    callbacks: list[TrainerCallback] = [
        WholeCheckpoints(run.path, source, dtypes, settings.keep, processes),
        shown,
        *plan.fade_callbacks(),
    ]
    interrupts = Interrupts(console if processes.is_main else None)
    trainer = _RunTrainer(
        plan.learner,
        arguments_of(plan, run.path, begins=run.checkpoint is None),
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
    return trainer


def _report(out: Path, plan: Plan, trainer: _RunTrainer, checkpoint: Path | None) -> TrainReport:
    state: TrainerState = trainer.state
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    measured = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
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
        tokens_per_second=trainer.pace.tokens_per_second,
        peak_memory=peak_memory(trainer.args.device),
        resumed_from=None if checkpoint is None else step_of(checkpoint),
        notes=plan.notes,
    )


def _write(
    trainer: _RunTrainer, plan: Plan, source: Path, folder: Path, processes: Processes, bundle_code: bool
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
    from gda.training.plot import plot

    plot(out)


def _push(out: Path, repo: str, private: bool | None, bundle_code: bool, console: Console | None) -> PushReport:
    try:
        return push(out, repo, private=private, bundle_code=bundle_code, console=console)
    except (ConnectionError, PermissionError, ValueError) as error:
        raise type(error)(f"{error}; {out} is whole: `gda push {out} {repo}` goes on") from None
