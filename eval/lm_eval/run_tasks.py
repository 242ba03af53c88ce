"""lm-eval's evaluation of a loaded model, without the messages that lm-eval prints on the way."""

import contextlib
import inspect
import logging
import sys
import traceback
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any

import lm_eval.api.task
import lm_eval.evaluator
from lm_eval.api.group import Group
from lm_eval.api.samplers import ContextSampler
from lm_eval.api.task import Task
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import simple_parse_args_string
from tqdm import tqdm
from transformers import GenerationConfig, GenerationMixin, PreTrainedTokenizerBase

from gda.common.errors import first_line
from gda.common.progress import log_level
from gda.eval.lm_eval.find_tasks import code_allowed, task_under_way
from gda.eval.lm_eval.harness import GDALM
from gda.eval.options import TaskOptions

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval takes the first
SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")


def run_tasks(lm: GDALM, tasks: Sequence[Task | Group], options: TaskOptions, **lm_eval_options: Any) -> dict[str, Any]:
    """Run tasks on a model, both loaded, and return lm-eval's dictionary."""
    if options.seed is not None:
        lm_eval_options |= dict.fromkeys(SEEDS, options.seed)
    try:
        with code_allowed(options.confirm_run_unsafe_code):
            results = simple_evaluate(
                model=lm,
                tasks=list(tasks),
                task_manager=TaskManager(include_defaults=False),  # the tasks are loaded already
                num_fewshot=options.num_fewshot,
                limit=options.limit,
                batch_size=lm.batch_size,
                device=str(lm.device),
                apply_chat_template=options.apply_chat_template,
                system_instruction=options.system_instruction,
                gen_kwargs=options.gen_kwargs,
                confirm_run_unsafe_code=options.confirm_run_unsafe_code,
                **lm_eval_options,
            )
    except (AssertionError, ValueError) as error:
        if (too_few := _too_few_examples(error)) is not None:
            raise ValueError(too_few) from None
        if isinstance(error, ValueError):
            raise
        # lm-eval asserts that a request fits the model
        longest = f"requests of at most {lm.max_length} tokens"
        raise ValueError(f"lm-eval cannot run this on the model, which reads {longest}: {first_line(error)}") from None
    if results is None:  # in all but the first process
        return {}
    for config in results["configs"].values():
        if isinstance(tokenizer := (config.get("metadata") or {}).get("tokenizer"), PreTrainedTokenizerBase):
            config["metadata"]["tokenizer"] = tokenizer.name_or_path
    return results


def check_generation(tasks: Sequence[Task | Group], options: TaskOptions) -> None:
    """Raise ValueError for an argument of generation that is unknown, or without effect because of a task's own.

    transformers would refuse an unknown one, but only after lm-eval has run all tasks that don't generate. Of one
    without effect, lm-eval only warns, in a log that is silent here.
    """
    given = options.gen_kwargs or {}
    given = simple_parse_args_string(given) if isinstance(given, str) else given
    single = [task for each in tasks for task in (each.get_all_tasks() if isinstance(each, Group) else [each])]
    generating = [task for task in single if task.OUTPUT_TYPE == "generate_until"]
    if given and not generating:
        raise ValueError("--gen-kwargs has no effect, because none of the tasks generates text; omit it")
    own = inspect.signature(GenerationMixin.generate).parameters
    known = {"until", "trust_remote_code", *LENGTHS, *GenerationConfig().to_dict(), *own}
    if unknown := [name for name in given if name not in known]:
        close = get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"--gen-kwargs: generation has no argument {unknown[0]}{hint}")
    try:
        float(given.get("temperature") or 0)
    except (TypeError, ValueError):
        raise ValueError(f"--gen-kwargs: temperature {given['temperature']!r} is not a number") from None
    for task in generating:
        both = {**(task.config.generation_kwargs or {}), **given}
        sampling, temperature = both.get("do_sample"), float(both.get("temperature") or 0)
        if given.get("temperature") and sampling is False:
            raise ValueError(
                f"--gen-kwargs: temperature has no effect on the task {task.config.task}, where do_sample is false; "
                "add do_sample=true"
            )
        if given.get("do_sample") and not temperature:
            raise ValueError(
                f"--gen-kwargs: do_sample has no effect on the task {task.config.task}, where temperature is 0; "
                "add temperature=…"
            )
        taken = next((name for name in LENGTHS if both.get(name) is not None), None)
        if taken is not None and taken not in given and (ignored := [name for name in LENGTHS if name in given]):
            raise ValueError(
                f"--gen-kwargs: {ignored[0]} has no effect on the task {task.config.task}, which sets {taken}; "
                f"use {taken}"
            )


def _too_few_examples(error: Exception) -> str | None:
    """What is wrong if lm-eval failed to draw few-shot examples, with the task and the number of its documents."""
    task = task_under_way(error)
    frames = traceback.walk_tb(error.__traceback__)
    if task is None or not any(isinstance(frame.f_locals.get("self"), ContextSampler) for frame, _ in frames):
        return None
    return (
        f"task {task.config.task}: {task.config.num_fewshot} few-shot examples are more than fit, because the task "
        f"draws them from {len(list(task.fewshot_docs()))} documents; lower --num-fewshot, or add documents"
    )


@contextlib.contextmanager
def quiet_lm_eval(*, progress: bool = True) -> Iterator[None]:
    """Silence lm-eval's warnings and, without `progress`, its bars; what it prints goes to standard error.

    Two of them have no switch, hence the replaced functions: the bar while requests are built, and the call of git,
    which complains where the current folder is not a repository.
    """
    before = lm_eval.evaluator.get_git_commit_hash, lm_eval.api.task.tqdm
    lm_eval.evaluator.get_git_commit_hash = lambda: None
    lm_eval.api.task.tqdm = partial(tqdm, disable=not progress, desc="Building requests", leave=False)
    try:
        with log_level("lm_eval", logging.ERROR), contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        lm_eval.evaluator.get_git_commit_hash, lm_eval.api.task.tqdm = before
