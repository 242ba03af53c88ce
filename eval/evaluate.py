"""`gda.evaluate` and what `gda eval` does: one model, or a model and its baseline, on the same tasks."""

import contextlib
import math
import random
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gda.common.errors import first_line, is_out_of_memory
from gda.common.options import flag, takes
from gda.common.perplexity import TextPerplexity, text_perplexity
from gda.common.progress import duration, is_main_process, shows_progress
from gda.common.screen import progress_bars, quiet_transformers
from gda.common.text import read_text
from gda.conversion.sources.compare_tokenizers import first_difference
from gda.eval.attention.diagnostics import DiagnosticsReport, diagnose, read_prompt_settings, read_texts
from gda.eval.compare import compare
from gda.eval.models import Candidate, choose_device, find_model, longest_sequence
from gda.eval.options import DEFAULT_CONTEXT, EvaluateOptions, TaskOptions
from gda.eval.report import OF_PROMPTS, EvalReport, ModelResult, scores_bare_text

if TYPE_CHECKING:  # only tasks need lm-eval
    from gda.eval.lm_eval.harness import GDALM, ReceivedRequest


@takes(TaskOptions)
def evaluate(
    options: TaskOptions,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    **lm_eval_options: Any,
) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness on a model, which may also be one in memory.

    A model in memory keeps its device, data type and mode.

    Args:
        tokenizer: Tokenizer of the model. Required for a model in memory.
        lm_eval_options: Further arguments of `lm_eval.simple_evaluate`, such as `bootstrap_iters` or `log_samples`.

    Returns:
        lm-eval's dictionary of results: ["results"][task]["acc,none"], ["samples"], ["configs"] and others. With
        several processes it is empty in all but the first.

    Raises:
        FileNotFoundError, ValueError: for bad input, in one line that names the remedy; also for a checkpoint that
            lacks weights and for a log-likelihood that is not finite.

    Warns:
        UserWarning: for an option that a task ignored, and for prompts that were cut.
    """
    if not options.tasks:
        raise ValueError("--tasks names no task")
    from gda.eval.lm_eval.harness import load_for_tasks
    from gda.eval.lm_eval.run_tasks import quiet_lm_eval, run_tasks

    choose_device(options.device)
    candidate = find_model(options.model, tokenizer)
    _check_chat_templates([candidate], options)
    training = isinstance(options.model, torch.nn.Module) and options.model.training
    try:
        with quiet_lm_eval():
            tasks = _load_tasks(candidate, options)
            lm = load_for_tasks(candidate, options)
            results = run_tasks(lm, tasks, options, **lm_eval_options)
    finally:
        if isinstance(options.model, torch.nn.Module):
            options.model.train(training)
    for note in _notes(lm, results, options):
        warnings.warn(note, stacklevel=3)
    return results


@takes(EvaluateOptions)
def evaluate_with_baseline(
    options: EvaluateOptions,
    *,
    console: Console | None = None,
    keep: Callable[[EvalReport], None] = lambda report: None,
) -> EvalReport | None:
    """Evaluate a model, and its baseline with the same options.

    Args:
        keep: Called with the results so far if the baseline or the diagnostics fail, or are interrupted.

    Returns:
        The report, or None in all but the first of several processes.

    Raises:
        FileNotFoundError, ValueError: for bad input, in one line that names the remedy.
    """
    first_process = is_main_process()
    console = console if console is not None and first_process else Console(quiet=True)
    choose_device(options.device)
    if not options.tasks and not first_process:
        return None  # only tasks are divided among processes
    settings = None
    if options.diagnostics:
        settings = read_prompt_settings(_metadata(options), alone=not options.tasks)
    text = None if options.perplexity is None else _read_text(Path(options.perplexity))
    candidates = _find_models(options)
    _check_chat_templates(candidates, options)
    texts = [] if settings is None else read_texts(settings, *(each.tokenizer for each in candidates))
    results: list[ModelResult] = []
    try:
        with _quiet(options, console), _memory_explained():
            loaded = _evaluate_all(candidates, options, text, console, results)
            if not first_process:
                return None
            diagnostics = None
            if settings is not None:
                second = loaded[1] if len(loaded) > 1 else None
                diagnostics = diagnose(loaded[0], texts, settings, baseline=second, console=console)
    except BaseException as error:  # Ctrl-C too: the model may have taken hours
        if results and first_process:
            what = "the diagnostics" if len(results) == len(candidates) else candidates[len(results)].name
            reason = "interrupted" if isinstance(error, KeyboardInterrupt) else first_line(error)
            results[0].notes.append(f"{what} failed: {reason}")
            keep(_report(results, candidates, text, options))
        raise
    return _report(results, candidates, text, options, diagnostics)


def _evaluate_all(
    candidates: list[Candidate],
    options: EvaluateOptions,
    text: str | None,
    console: Console,
    results: list[ModelResult],
) -> list[PreTrainedModel]:
    """Add a result for each model to `results` as soon as it is known; return the models if diagnostics need them."""
    tasks, loaded = [], []
    if options.tasks:
        console.print(f"loading {', '.join(options.tasks)}", highlight=False, markup=False)
        tasks = _load_tasks(candidates[0], options)
    for candidate in candidates:
        console.print(_announcement(candidate, results, len(candidates)), highlight=False, markup=False)
        result, loaded_model = _evaluate_one(candidate, options, tasks, text, console)
        results.append(result)
        if options.diagnostics and is_main_process():
            loaded.append(loaded_model)  # only diagnostics need both models in memory
        del loaded_model
    return loaded


def _report(
    results: list[ModelResult],
    candidates: list[Candidate],
    text: str | None,
    options: EvaluateOptions,
    diagnostics: DiagnosticsReport | None = None,
) -> EvalReport:
    model, baseline = results[0], results[1] if len(results) > 1 else None
    if text is not None and baseline is not None:
        ids, others = (each.tokenizer(text, add_special_tokens=False, verbose=False).input_ids for each in candidates)
        if ids != others:
            model.notes.append(
                "perplexity: the tokenizer reads the text differently than the baseline's, "
                f"{first_difference(ids, others)}; compare perplexity per word or byte"
            )
    rows = compare(model.results, None if baseline is None else baseline.results)
    return EvalReport(model, baseline, rows, options, diagnostics)


def _announcement(candidate: Candidate, done: list[ModelResult], number: int) -> str:
    """What is run next and, if it is the second model, how long the first took: this one takes about as long."""
    if number == 1:
        return f"running {candidate.name}"
    expected = "".join(f"; {each.name} took {duration(each.seconds)}" for each in done)
    return f"running {candidate.name} ({len(done) + 1} of {number}{expected})"


def _quiet(options: EvaluateOptions, console: Console) -> contextlib.AbstractContextManager[None]:
    if not options.tasks:
        return quiet_transformers()
    from gda.eval.lm_eval.run_tasks import quiet_lm_eval

    return quiet_lm_eval(progress=shows_progress(console))


@contextlib.contextmanager
def _memory_explained() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        remedy = "lower --batch-size or --context, or use --dtype bfloat16 or --device cpu"
        raise ValueError(f"{first_line(error)}; {remedy}") from None


def _find_models(options: EvaluateOptions) -> list[Candidate]:
    """The model and, if there is one, the baseline, under different names."""
    candidates = [find_model(place) for place in (options.model, options.baseline) if place is not None]
    if len({candidate.name for candidate in candidates}) == len(candidates):
        return candidates
    names = (str(options.model), f"{options.baseline} (baseline)")
    return [replace(candidate, name=name) for candidate, name in zip(candidates, names, strict=True)]


def _check_chat_templates(candidates: list[Candidate], options: TaskOptions) -> None:
    for candidate in candidates if options.apply_chat_template else []:
        if candidate.tokenizer.chat_template is None:
            raise ValueError(f"--apply-chat-template: the tokenizer of {candidate.name} has no chat template")


def _load_tasks(candidate: Candidate, options: TaskOptions) -> list[Any]:
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    from gda.eval.lm_eval.find_tasks import load_tasks
    from gda.eval.lm_eval.run_tasks import check_generation

    # As lm-eval does before it loads tasks: some, such as RULER's, draw their documents then.
    random.seed(DEFAULT_RANDOM_SEED if options.seed is None else options.seed)
    np.random.seed(DEFAULT_OTHER_SEED if options.seed is None else options.seed)
    metadata = {"tokenizer": candidate.tokenizer, **_metadata(options)}
    tasks = load_tasks(
        options.tasks or (),
        dataset_root=options.dataset_root,
        metadata=metadata,
        include_path=options.include_path,
        run_code=options.confirm_run_unsafe_code,
    )
    check_generation(tasks, options)
    return tasks


def _metadata(options: TaskOptions) -> dict[str, Any]:
    return options.metadata if isinstance(options.metadata, dict) else {}


def _evaluate_one(
    candidate: Candidate, options: EvaluateOptions, tasks: list[Any], text: str | None, console: Console
) -> tuple[ModelResult, PreTrainedModel]:
    started = time.monotonic()
    hashes = candidate.hashes()
    results: dict[str, Any] = {"results": {}}
    prompts: list[ReceivedRequest] = []
    notes: list[str] = []
    if tasks:
        from gda.eval.lm_eval.harness import load_for_tasks

        progress = shows_progress(console)
        lm = load_for_tasks(candidate, options, show_prompts=options.show_prompts, progress=progress)
        model = lm.model
    else:
        model = candidate.load(options)
    measured = None
    if text is not None and is_main_process():
        measured = _measure_perplexity(model, candidate.tokenizer, text, options, console)
        if (wanted := options.context or DEFAULT_CONTEXT) > measured.context:
            notes.append(f"perplexity: the model reads {measured.context} tokens at a time, not {wanted}")
    if tasks:  # last, because they may take hours, which a failure of the perplexity would waste
        from gda.eval.lm_eval.run_tasks import run_tasks

        results = run_tasks(lm, tasks, options)
        prompts, notes = lm.received, [*_notes(lm, results, options), *notes]
    result = ModelResult(
        name=candidate.name,
        revision=candidate.revision,
        results=results,
        perplexity=measured,
        prompts=prompts,
        sha256=hashes.result(),
        seconds=time.monotonic() - started,
        dtype=str(model.dtype).removeprefix("torch."),
        notes=notes,
    )
    return result, model


def _notes(lm: "GDALM", results: dict[str, Any], options: TaskOptions) -> list[str]:
    """What a reader of the scores should know: prompts that were cut, and options that had no effect on a task."""
    notes = [
        f"{task}: {number} requests are longer than the {lm.max_length} tokens that the model reads; "
        "their beginning was cut"
        for task, number in lm.cut_by_task().items()
    ]
    bare = [task for task, config in results.get("configs", {}).items() if scores_bare_text(config)]
    of_prompts = [flag(name) for name in OF_PROMPTS if getattr(options, name)]
    if bare and of_prompts:
        notes.append(
            f"{', '.join(bare)}: {', '.join(of_prompts)} had no effect; the task scores a text without a prompt"
        )
    if lm.dropped_system_message:
        notes.append("the chat template leaves out the system message: --system-instruction or a task's description")
    shots = {task: number for task, number in results.get("n-shot", {}).items() if task in results["configs"]}
    fixed = [task for task, number in shots.items() if options.num_fewshot not in (None, number)]
    if fixed := [task for task in fixed if task not in bare]:
        notes.append(
            f"{', '.join(fixed)}: --num-fewshot {options.num_fewshot} was ignored; the task's definition fixes the "
            "number of examples"
        )
    return notes


def _measure_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    options: EvaluateOptions,
    console: Console,
) -> TextPerplexity:
    with progress_bars(console) as bar:
        task = bar.add_task("perplexity", total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        context = min(options.context or DEFAULT_CONTEXT, longest_sequence(model.config))
        stride = min(options.stride or context, context)
        measured = text_perplexity(model, tokenizer, text, context=context, stride=stride, advance=advance)
    if math.isnan(measured.token):
        raise ValueError(
            f"--perplexity is {measured.token}; the weights are damaged, or overflow in {model.dtype} (try "
            "--dtype float32)"
        )
    return measured


def _read_text(path: Path) -> str:
    _, text = read_text(path)
    if not text.strip():
        raise ValueError(f"--perplexity {path} is empty")
    return text
