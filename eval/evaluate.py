"""One model on some tasks."""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase

from gda.common.errors import first_line
from gda.eval.lm_eval.find_tasks import load_tasks
from gda.eval.lm_eval.harness import GDALM
from gda.eval.models import find_model, quiet_lm_eval

DTYPES = ("auto", "float32", "bfloat16", "float16")


def evaluate(
    model: str | Path | torch.nn.Module,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    *,
    tasks: str | Sequence[str],
    dataset_root: str | Path | None = None,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = 1,
    device: str | None = None,
    dtype: str = "auto",
    apply_chat_template: bool = False,
    seed: int | None = None,
    metadata: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness on a model.

    Args:
        model: A folder, a Hub id, a `.gguf` file, or a model in memory, which keeps its device, dtype and mode.
        tokenizer: Needed for a model in memory; by default the model's own.
        tasks: Names of tasks, groups or tags, ours or lm-eval's, patterns such as "blimp_*", or YAML files.
        dataset_root: Read the data of tasks from `dataset_root`/dataset_path/dataset_name/split.jsonl (or .parquet).
        limit: Documents of each task, or their share if below 1.
        num_fewshot: Examples in front of each question, instead of the task's own number.
        batch_size: Requests at a time, or "auto".
        device: By default a GPU if there is one, else the CPU.
        dtype: "auto" for the checkpoint's, "float32", "bfloat16" or "float16".
        apply_chat_template: Whether prompts are put into the tokenizer's chat template.
        seed: Of every generator; by default lm-eval's own seeds.
        metadata: What generated tasks are told, such as {"length": 4096}.
        options: Further ones of `lm_eval.simple_evaluate`, such as `bootstrap_iters` or `log_samples`.

    Returns:
        lm-eval's dictionary of results: ["results"][task]["acc,none"], ["samples"], ["configs"], …. With several
        processes it is empty in all but the first.

    Raises:
        FileNotFoundError, ValueError: for bad input, in one line that names the remedy; for a checkpoint that lacks
            weights, and a log-likelihood that is no number.

    Warns:
        UserWarning: for settings that a task did not take, and prompts that were cut.
    """
    check_settings(limit=limit, num_fewshot=num_fewshot, batch_size=batch_size, dtype=dtype, device=device, seed=seed)
    candidate = find_model(model, tokenizer)
    told = {"tokenizer": candidate.tokenizer} | (metadata or {})
    with quiet_lm_eval():
        loaded = load_tasks(split_names(tasks), dataset_root=dataset_root, metadata=told)
    training = isinstance(model, torch.nn.Module) and model.training
    lm = candidate.load(batch_size=batch_size, device=device, dtype=dtype)
    try:
        with quiet_lm_eval():
            results = run_tasks(
                lm,
                loaded,
                limit=limit,
                num_fewshot=num_fewshot,
                chat_template=apply_chat_template,
                seed=seed,
                **options,
            )
    finally:
        lm.model.train(training)
    for note in notes(lm, results, num_fewshot):
        warnings.warn(note, stacklevel=2)
    return results


def notes(lm: GDALM, results: dict[str, Any], num_fewshot: int | None) -> list[str]:
    """What one who reads the scores ought to know: prompts that were cut, and examples that were not given."""
    told = [
        f"{task}: {number} requests are longer than the {lm.max_length} tokens that the model takes; "
        "their beginning was cut"
        for task, number in lm.all_cut().items()
    ]
    shots = {task: number for task, number in results.get("n-shot", {}).items() if task in results["configs"]}
    if unmoved := [task for task, number in shots.items() if num_fewshot not in (None, number)]:
        told.append(f"{', '.join(unmoved)}: --num-fewshot {num_fewshot} was not taken; the definition fixes its number")
    return told


def run_tasks(
    lm: GDALM,
    tasks: Sequence[Task | Group],
    *,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    chat_template: bool = False,
    seed: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Run tasks that are built on a model that is loaded.

    Raises:
        ValueError: if they cannot be run on it.
    """
    if chat_template and lm.tokenizer.chat_template is None:
        raise ValueError("--apply-chat-template: the tokenizer has no chat template")
    limit = int(limit) if limit is not None and limit >= 1 else limit  # lm-eval takes 1.0 for a share
    if seed is not None:
        options |= dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    try:
        results = simple_evaluate(
            model=lm,
            tasks=list(tasks),
            task_manager=TaskManager(include_defaults=False),  # they are built already
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=lm.batch_size,
            device=str(lm.device),
            apply_chat_template=chat_template,
            **options,
        )
    except AssertionError as error:  # how lm-eval says that a request does not fit the model
        longest = f"requests of at most {lm.max_length} tokens"
        raise ValueError(f"lm-eval cannot run this on the model, which takes {longest}: {first_line(error)}") from None
    if results is None:  # not the first process
        return {}
    for config in results["configs"].values():
        if isinstance(told := (config.get("metadata") or {}).get("tokenizer"), PreTrainedTokenizerBase):
            config["metadata"]["tokenizer"] = told.name_or_path
    return results


def split_names(tasks: str | Sequence[str]) -> list[str]:
    """Names in the order given, once each; commas part them as well.

    Raises:
        ValueError: if there is none.
    """
    given = [tasks] if isinstance(tasks, str) else list(tasks)
    names = [name.strip() for one in given for name in one.split(",") if name.strip()]
    if not names:
        raise ValueError("--tasks names no task")
    return list(dict.fromkeys(names))


def check_settings(
    *,
    limit: int | float | None,
    num_fewshot: int | None,
    batch_size: int | str,
    dtype: str,
    device: str | None,
    seed: int | None,
) -> None:
    """Refuse settings that cannot be.

    Raises:
        ValueError: naming the option.
    """
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and float(limit).is_integer())):
        raise ValueError(f"--limit {limit} is not a number of documents, or a share below 1")
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"--num-fewshot {num_fewshot} is negative")
    if not re.fullmatch(r"0*[1-9][0-9]*|auto(:[1-9][0-9]*)?", str(batch_size)):
        raise ValueError(f"--batch-size {batch_size} is neither a number from 1 on nor auto")
    if seed is not None and not 0 <= seed < 2**32:
        raise ValueError(f"--seed {seed} is not from 0 to {2**32 - 1}")
    if device is not None:
        check_device(device)
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}")


def check_device(device: str) -> None:
    """Refuse a device that is not there, where lm-eval would take another.

    Raises:
        ValueError: naming the devices there are.
    """
    there = ["cpu"]
    if torch.cuda.is_available():
        there += ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        there.append("mps")
    if device not in there:
        raise ValueError(f"--device {device} is not there; there are {', '.join(there)}")
