"""`gda.train`: train a GDA model on text with the Trainer of transformers, in runs that can be stopped and resumed."""

import contextlib
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from accelerate.utils import patch_environment
from rich.console import Console
from transformers import PrinterCallback
from transformers.integrations import INTEGRATION_TO_CALLBACK
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from gda.common.dataset_folders import data_files, is_saved, of_train
from gda.common.errors import Interrupted
from gda.common.files import NoSpaceError, stamps
from gda.common.options import takes
from gda.common.progress import shows_progress
from gda.common.screen import quiet_transformers
from gda.common.versions import versions
from gda.conversion.push import push_result
from gda.conversion.sources.config_file import read_gda_config
from gda.conversion.sources.hub import require_token
from gda.conversion.sources.open import resolve_folder
from gda.conversion.sources.tokenizers import read_tokenizer
from gda.conversion.writing.provenance import history_of
from gda.training.callbacks.checkpoints import STREAM_FILE, CheckpointCallback
from gda.training.callbacks.layer_log import LayerLog
from gda.training.callbacks.progress import ProgressCallback
from gda.training.callbacks.stopping import InterruptHandler, NotFiniteError, StopCallback
from gda.training.data.sequences import collate, describe_sequence
from gda.training.data.sources import TEXT
from gda.training.data.stream import SequenceStream
from gda.training.plan import Plan, context_of, make_plan, steps_per_epoch, training_arguments
from gda.training.plot import plot
from gda.training.report import TrainReport, peak_memory
from gda.training.runs.checkpoints import damage_reported, last_checkpoint, require_readable, step_of
from gda.training.runs.failures import explained
from gda.training.runs.model_folder import add_companions, model_stamps, stored_dtypes, training_step, write_card
from gda.training.runs.processes import (
    LAUNCHER_PRECISION,
    Processes,
    auto_is_bfloat16,
    reported_elsewhere,
    require_known_precision,
)
from gda.training.runs.run_folder import LOG_FILE, RunFolder, RunIdentity, RunState, unfinished_run
from gda.training.runs.run_trainer import RunTrainer, make_universal, written_by
from gda.training.runs.watch import watched
from gda.training.settings import TrainOptions
from gda.training.sharding import NEW_WITH_DEEPSPEED
from gda.training.weights import save_plain


@takes(TrainOptions)
def train(options: TrainOptions, *, console: Console | None = None) -> TrainReport:
    """Train a GDA language model on text with the Trainer of transformers.

    Weights are trained in float32 and saved in the data types that they have in `model`; λ is always float32. A model
    in masked growth is faded in over the steps (`FadeCallback`), and nothing is masked in `out`.

    A run in progress is stored in ``.OUT.partial`` with its checkpoints, which are model folders too. Ctrl-C or
    SIGTERM finishes the step, writes a checkpoint and raises KeyboardInterrupt; a second one stops at once. `resume`
    continues from the last complete checkpoint and ends with the same weights as an uninterrupted run.

    `out` appears only when it is complete. It holds the model, its tokenizer, generation config, licences, code and
    trainable.json (if `model` has one), training.json (settings and report) and training_log.jsonl.

    With `accelerate launch` or torchrun, every process calls this function. The main one writes; all return the report.
    If one of them is lost, the others end, too: with ConnectionError, or with exit code 2 while they wait for the lost
    one.

    Raises:
        FileNotFoundError, FileExistsError, ValueError, ImportError, OSError: for bad input, in one line that names the
            remedy.
        CheckFailed: if a loss, a gradient or a parameter is not finite. The last checkpoint is kept and named.
        KeyboardInterrupt: if the run was interrupted.
    """
    if options.out is None:  # the command draws the log of an earlier run then
        raise ValueError("out is missing; to draw the log of an earlier run, call gda.training.plot.plot")
    out = Path(options.out)
    processes = Processes()
    with quiet_transformers():
        source = processes.together(lambda: _check_inputs(options, processes))
        if options.dry_run:
            return _dry_run(options, source, out, processes, console)
        if (repo := options.push_to_hub) is not None:
            processes.on_main(lambda: require_token(repo))
        report = _run(options, source, out, processes, console)
        if options.plot:
            processes.on_main(lambda: plot(out))
    if repo is None:
        return report
    push = partial(push_result, private=options.private, bundle_code=options.bundle_code, console=console)
    return replace(report, pushed=processes.on_main(lambda: push(out, repo)))


def _check_inputs(options: TrainOptions, processes: Processes) -> Path:
    """Refuse bad input before anything large is read; return the local folder of the model."""
    processes.require_sharding()
    if options.precision == "auto":
        require_known_precision()
    if options.train == "new" and processes.uses_deepspeed:
        raise ValueError(NEW_WITH_DEEPSPEED)
    if options.gradient_checkpointing and processes.fsdp_recomputes:  # the Trainer refuses that after tokenizing
        raise ValueError("--gradient-checkpointing: the configuration for FSDP recomputes activations; omit the option")
    if options.revision is not None and Path(options.model).exists():
        raise ValueError(f"--revision is for a Hub id, but {options.model} is a local path")
    for reporter in options.report_to:
        if reporter not in INTEGRATION_TO_CALLBACK:
            raise ValueError(f"--report-to {reporter!r} is not a reporter; use tensorboard, trackio or wandb")
    source = resolve_folder(options.model, options.revision)
    read_gda_config(source)
    history_of(source)
    return source


def _dry_run(
    options: TrainOptions, source: Path, out: Path, processes: Processes, console: Console | None
) -> TrainReport:
    """The report of what a run would do. The data is tokenized in a temporary folder."""
    settings = options.settings
    with contextlib.ExitStack() as stack:
        # Beside OUT, all machines see it.
        beside = next(folder for folder in out.absolute().parents if folder.is_dir())
        temporary = partial(
            tempfile.TemporaryDirectory, prefix="gda-train-", dir=beside if processes.count > 1 else None
        )
        made = processes.on_main(lambda: stack.enter_context(temporary()))
        scratch = Path(made)
        processes.together(lambda: _require_shared(scratch, processes))
        plan = processes.together(lambda: make_plan(source, settings, processes, scratch, console))
        if options.show_batch:
            processes.on_main(lambda: _show_batch(plan, source, console))
    epochs, steps = 0, plan.steps
    if plan.sequences.count is not None:
        epochs, steps = divmod(plan.steps, steps_per_epoch(settings, plan.sequences.count, processes.count))
    per_step = settings.batch_size * settings.accumulation * processes.count
    sequences = epochs * (plan.sequences.count or 0) + steps * per_step
    obstacles = [None if options.overwrite else unfinished_run(out, resume=options.resume)]
    try:
        plan.require_space(out)
    except NoSpaceError as error:
        obstacles.append(str(error))
    return TrainReport(
        out=out,
        steps=plan.steps,
        tokens=sequences * context_of(settings, plan.config),
        data_tokens=plan.sequences.tokens,
        num_parameters=plan.num_parameters,
        num_trained=plan.num_trained,
        dry_run=True,
        notes=[*plan.notes, *filter(None, obstacles)],
    )


def _show_batch(plan: Plan, source: Path, console: Console | None) -> None:
    for line in describe_sequence(next(iter(plan.sequences.rows)), read_tokenizer(source)):
        (console or Console(stderr=True)).print(line, markup=False, highlight=False, soft_wrap=True)


def _require_shared(folder: Path, processes: Processes) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"process {processes.index} does not see {folder}, which all machines must share")


# ---------------------------------------------------------------------------------------------------------- the run


def _run(options: TrainOptions, source: Path, out: Path, processes: Processes, console: Console | None) -> TrainReport:
    """Train in ``.OUT.partial``, which becomes OUT; on an error, say what is left of the run."""
    settings = options.settings
    data = [file for name in (*settings.data, *settings.eval_data) for file in _files(Path(name))]
    teacher = [] if settings.teacher is None else model_stamps(Path(settings.teacher))
    is_local = Path(options.model).exists()
    name = source.resolve().name if is_local else f"{options.model} at commit {source.name}"
    commit, model = (None, model_stamps(source)) if is_local else (source.name, [])
    folder: RunFolder | None = None  # in the main process

    def open_folder() -> RunState:
        nonlocal folder
        auto = None
        if settings.precision == "auto":
            auto = "bfloat16" if auto_is_bfloat16(stored_dtypes(source).values()) else "float32"
        identity = RunIdentity(settings, commit, model, teacher, stamps(data), processes.count, processes.keeper, auto)
        folder = RunFolder(out, identity, source, resume=options.resume, overwrite=options.overwrite)
        return folder.state

    def begin() -> None:
        assert folder is not None
        folder.begin()

    def finish() -> None:
        assert folder is not None
        history = [*history_of(source), training_step(settings, report, name)]
        if folder.state.report is None:
            write_card(state.path, source, out.name, history, has_code=options.bundle_code)
        origin = {
            "model": name,
            "data": [file.name for file in data],
            "versions": versions("torch", "transformers", "accelerate"),
            "history": history,
        }
        folder.finish(origin, report)

    state = processes.on_main(open_folder)
    try:
        with watched(processes):
            processes.together(lambda: _require_shared(state.path, processes))
            if state.report is not None:
                report = TrainReport.from_dict(state.report, out, state.path)
            else:
                report = _train(options, state, source, out, processes, console, begin)
            processes.on_main(finish)
            return report
    except BaseException as error:
        last = folder.close() if folder is not None else last_checkpoint(state.path)
        if isinstance(error, KeyboardInterrupt) and folder is not None and folder.replaces:
            raise Interrupted("stopped before the first step; what was to be replaced is kept; run again") from None
        if (explanation := explained(error, last, state.path, settings)) is None:
            raise
        if isinstance(error, NotFiniteError) and not processes.is_main:
            reported_elsewhere(explanation)
        raise explanation from None


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = data_files(path, TEXT)
    return [path / file for file in (files if is_saved(path) else of_train(files))]


def _train(
    options: TrainOptions,
    state: RunState,
    source: Path,
    out: Path,
    processes: Processes,
    console: Console | None,
    begin: Callable[[], None],
) -> TrainReport:
    """Train the model and save it in the folder of the run, beside its checkpoints.

    `begin` removes what the run replaces. It is called when all that may be wrong before the first step is known.
    """
    settings = options.settings
    resumes = state.checkpoint is not None
    plan = processes.together(lambda: make_plan(source, settings, processes, state.data, console, resumes=resumes))
    processes.on_main(lambda: plan.require_space(out))
    if console is not None and shows_progress(console) and processes.is_main:
        for note in plan.notes:  # the report has them at the end
            console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    if options.show_batch:
        processes.on_main(lambda: _show_batch(plan, source, console))
    if state.checkpoint is not None:
        processes.on_main(partial(require_readable, state.checkpoint))
    interrupts = InterruptHandler(console if processes.is_main else None)
    stop = StopCallback(interrupts, processes)
    trainer = _make_trainer(plan, state, source, processes, stop, shows_progress=shows_progress(console))
    processes.on_main(begin)
    if (last := state.checkpoint) is not None and processes.uses_deepspeed and written_by(last) != processes.count:
        processes.on_main(lambda: make_universal(last))
        trainer.expect_universal()
    with interrupts.installed(), contextlib.redirect_stdout(sys.stderr):
        trainer.train(resume_from_checkpoint=None if state.checkpoint is None else str(state.checkpoint))
    if stop.interrupted:
        raise stop.interruption()
    report = _report(plan, trainer, state, out)
    learner: Any = trainer.model
    config = learner.config
    config.use_cache = plan.config.use_cache  # the Trainer switches it off
    processes.together(
        lambda: save_plain(learner, state.path, plan.dtypes, writes=processes.is_main, bundle_code=options.bundle_code)
    )
    processes.on_main(lambda: add_companions(config, source, state.path))
    if trainer.is_deepspeed_enabled:  # otherwise each model that is built from here on would be sharded, too
        unset_hf_deepspeed_config()
    return report


def _make_trainer(
    plan: Plan, state: RunState, source: Path, processes: Processes, stop: StopCallback, *, shows_progress: bool
) -> RunTrainer:
    settings = plan.settings
    dtypes = {name: str(dtype).removeprefix("torch.") for name, dtype in plan.dtypes.items()}
    rows = plan.sequences.rows
    stream = rows if isinstance(rows, SequenceStream) else None
    if stream is not None and state.checkpoint is not None:
        with damage_reported(state.checkpoint):
            stream.resume(state.checkpoint / STREAM_FILE)
    checkpoints = CheckpointCallback(source, dtypes, settings, processes, stream)
    resumes, precision = state.checkpoint is not None, "bf16" if plan.computes_in_bfloat16 else "no"
    with patch_environment(**{LAUNCHER_PRECISION: precision}):  # instead of the launcher's
        trainer = RunTrainer(
            plan.learner,
            training_arguments(plan, state.path, processes.count, resumes=resumes, shows_progress=shows_progress),
            train_dataset=rows,
            eval_dataset=None if plan.eval_sequences is None else plan.eval_sequences.rows,
            data_collator=collate,
            callbacks=[checkpoints, ProgressCallback(), *plan.fade_callbacks()],
            lambda_learning_rate=settings.lambda_learning_rate,
            distillation=plan.distillation,
            predicted_per_sequence=plan.eval_sequences and plan.eval_sequences.predicted_per_sequence(),
            layer_log=LayerLog(state.path / LOG_FILE if processes.is_main else None),
            stop=stop,
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _report(plan: Plan, trainer: RunTrainer, state: RunState, out: Path) -> TrainReport:
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    several = max(1, len(losses) // 5)
    measured = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return TrainReport(
        out=out,
        steps=trainer.state.global_step,
        tokens=int(trainer.state.num_input_tokens_seen),
        data_tokens=plan.sequences.tokens,
        num_parameters=plan.num_parameters,
        num_trained=plan.num_trained,
        first_loss=mean(losses[:several]),
        last_loss=mean(losses[-several:]),
        first_eval_loss=measured[0] if measured else None,
        last_eval_loss=measured[-1] if measured else None,
        tokens_per_second=trainer.throughput.tokens_per_second,
        peak_memory=peak_memory(trainer.args.device),
        resumed_from=None if state.checkpoint is None else step_of(state.checkpoint),
        notes=plan.notes,
    )
