"""Options of `gda eval` and `gda attention`. Nothing heavy is imported here, so `--help` is fast."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gda.common.options import OUTPUT, PERPLEXITY, Options, argument, flag, layer_list, option
from gda.common.places import check_device, check_model, check_text, layers_of
from gda.eval.task_texts import check_tasks

# A model in memory is allowed in Python. Its class cannot be named without importing PyTorch, hence Any.
Model = str | Path | Any

TASKS, TEXT, MODEL = "Tasks", "Text", "Model"
DEFAULT_CONTEXT = 512  # tokens
RESULTS_FILE, MARKDOWN_FILE, HTML_FILE = "results.json", "results.md", "report.html"
SAMPLES = ("samples_", "baseline_samples_")  # beginnings of names: of the model and of its baseline
OF_TASKS = (
    *("dataset_root", "include_path", "limit", "num_fewshot", "apply_chat_template", "system_instruction"),
    *("gen_kwargs", "seed", "confirm_run_unsafe_code", "batch_size", "show_prompts"),
)
BATCH_SIZE = re.compile(r"0*[1-9][0-9]*|auto(:[1-9][0-9]*)?")


@dataclass(frozen=True)
class TaskOptions(Options):
    """Options of `gda.evaluate`: a model, tasks, and how they are run.

    `tasks` is stored as a tuple of names, and `metadata` and JSON in `gen_kwargs` as dictionaries.

    Raises:
        ValueError: if a value is out of range, naming the option.
    """

    model: Model = argument("Model to evaluate: a folder, a Hub id or a GGUF file.", check=check_model)
    tasks: str | Sequence[str] | None = option(
        None,
        "Names of tasks, groups or tags of lm-eval or of this package (gda_tasks), patterns such as blimp_*, or YAML "
        "files, separated by commas.",
        panel=TASKS,
    )
    dataset_root: str | Path | None = option(
        None,
        "Folder of datasets. DIR/dataset_path holds what `hf download` leaves; DIR/dataset_path/dataset_name holds "
        "what `save_to_disk` leaves, or SPLIT.jsonl or .parquet. Both names are fields of the task. Default: the Hub.",
        panel=TASKS,
        metavar="DIR",
    )
    include_path: str | Path | None = option(
        None, "Folder with further task definitions (YAML). Default: none.", panel=TASKS, metavar="DIR"
    )
    limit: int | float | None = option(
        None, "Number of documents of each task, or a fraction of them if below 1. Default: all.", panel=TASKS
    )
    num_fewshot: int | None = option(
        None, "Number of solved examples before each question. Default: the task's own number.", panel=TASKS, minimum=0
    )
    apply_chat_template: bool = option(False, "Format prompts with the tokenizer's chat template.", panel=TASKS)
    system_instruction: str | None = option(
        None, "Text at the beginning of each prompt, or its system message. Default: none.", panel=TASKS, metavar="TEXT"
    )
    gen_kwargs: dict[str, Any] | str | None = option(
        None,
        "Arguments of generation, as a JSON object or as temperature=0.7,do_sample=true. Default: the task's own.",
        panel=TASKS,
        metavar="ARGS",
    )
    seed: int | None = option(
        None,
        "Seed of lm-eval's generators: few-shot examples, and documents that a task draws. Default: lm-eval's seeds.",
        panel=TASKS,
        minimum=0,
        maximum=2**32 - 1,
    )
    confirm_run_unsafe_code: bool = option(
        False, "Allow tasks to run code that the model writes, as humaneval does. Nothing isolates it.", panel=TASKS
    )
    metadata: dict[str, Any] | str | None = option(
        None,
        'Settings of tasks that generate their data and of --diagnostics, such as {"length": 4096}; '
        "eval/tasks/README.md lists them. Default: the tasks' own settings.",
        panel=TASKS,
        metavar="JSON",
    )
    batch_size: int | str = option(
        1,
        "Number of requests in a batch. auto: as many as fit into memory. auto:N: the same, searched N times in a run.",
        panel=MODEL,
    )
    device: str | None = option(
        None, "Device to run on. Default: cuda if there is one, else cpu.", panel=MODEL, check=check_device
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "Data type to run the model in. auto: that of the checkpoint, and float32 for a GGUF file.", panel=MODEL
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "tasks", _task_names(self.tasks))
        object.__setattr__(self, "metadata", _json_object("--metadata", self.metadata))
        object.__setattr__(self, "gen_kwargs", _gen_kwargs(self.gen_kwargs))
        for name in ("include_path", "dataset_root"):
            if (folder := getattr(self, name)) is not None and not Path(folder).is_dir():
                raise FileNotFoundError(f"{flag(name)} {folder} is not a folder")
        if self.limit is not None and not 0 < self.limit < 1:
            if self.limit <= 0 or not float(self.limit).is_integer():
                raise ValueError(f"--limit {self.limit} is neither a number of documents nor a fraction below 1")
            object.__setattr__(self, "limit", int(self.limit))  # lm-eval reads 1.0 as a fraction
        if not BATCH_SIZE.fullmatch(str(self.batch_size)):
            raise ValueError(f"--batch-size {self.batch_size} is neither a positive number nor auto")

    def check_places(self) -> None:
        super().check_places()
        if self.tasks and self.include_path is None:
            check_tasks(self.tasks)


@dataclass(frozen=True)
class EvaluateOptions(TaskOptions):
    """Options of `gda eval`: those of `gda.evaluate`, a baseline, and further measurements."""

    baseline: Model | None = option(
        None, "Second model to evaluate with the same options. Default: none.", panel=MODEL, check=check_model
    )
    show_prompts: int = option(
        0, "Number of requests per task to print, as text and token ids.", panel=OUTPUT, minimum=0
    )
    perplexity: str | Path | None = option(
        None,
        "Text file to measure the perplexity of. Default: none.",
        panel=PERPLEXITY,
        metavar="FILE",
        check=check_text,
    )
    context: int | None = option(
        None,
        f"Tokens that the model reads at a time for --perplexity. Default: {DEFAULT_CONTEXT}.",
        panel=PERPLEXITY,
        minimum=1,
    )
    stride: int | None = option(
        None,
        "Tokens between the starts of consecutive contexts. Default: --context, without overlap.",
        panel=PERPLEXITY,
    )
    diagnostics: bool = option(
        False, "Measure how much attention goes to the answer in retrieval prompts.", panel=PERPLEXITY
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tasks and self.perplexity is None and not self.diagnostics:
            raise ValueError("nothing to do: name --tasks, a text with --perplexity, or --diagnostics")
        for name in () if self.tasks else OF_TASKS:
            if str(getattr(self, name)) != str(getattr(type(self), name)):
                raise ValueError(f"{flag(name)} belongs to --tasks; name some")
        if self.metadata is not None and not self.tasks and not self.diagnostics:
            raise ValueError("--metadata belongs to --tasks and --diagnostics; pass one of them")
        if self.perplexity is None and (self.context is not None or self.stride is not None):
            raise ValueError("--context and --stride belong to --perplexity; name its FILE")
        context = DEFAULT_CONTEXT if self.context is None else self.context
        if self.stride is not None and not 0 < self.stride <= context:
            raise ValueError(f"--stride {self.stride} is not between 1 and the context of {context} tokens")


@dataclass(frozen=True)
class AttentionOptions(Options):
    """Options of `gda.attention`. `layers` is stored as a sorted tuple.

    Raises:
        ValueError: if a value is out of range, naming the option.
    """

    model: Model = argument("Model whose attention is shown: a folder, a Hub id or a GGUF file.", check=check_model)
    text: str | None = option(None, "Text to read. Pass this or --file.", panel=TEXT)
    file: str | Path | None = option(
        None, "File to read: text, or .jsonl with a field `text`. Pass this or --text.", panel=TEXT, check=check_text
    )
    max_tokens: int = option(512, "Largest number of tokens to read.", panel=TEXT, minimum=1)
    baseline: Model | None = option(
        None,
        "Second model to compare with, such as the source of a conversion. Default: none.",
        panel=MODEL,
        check=check_model,
    )
    device: str | None = option(
        None, "Device to run on. Default: cuda if there is one, else cpu.", panel=MODEL, check=check_device
    )
    revision: str | None = option(
        None, "Branch, tag or commit of MODEL, if it is a Hub id. Default: its main branch.", panel=MODEL
    )
    layers: str | Sequence[int] | None = option(
        None,
        "Layers whose maps are kept, such as 11,12, counted from 0. Fewer layers allow finer maps. Default: all.",
        panel=OUTPUT,
    )
    map_megabytes: float = option(
        36.0, "Limit on the size of all maps before compression, in megabytes.", panel=OUTPUT, above=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (layers := layer_list(self.layers)) is not None:
            object.__setattr__(self, "layers", tuple(sorted(set(layers))))
        if (self.text is None) == (self.file is None):
            raise ValueError("name one text: --text TEXT or --file FILE")

    def check_places(self) -> None:
        super().check_places()
        depth = layers_of(self.model) if self.layers and isinstance(self.model, str | Path) else None
        if depth is not None:
            self.chosen_layers(depth)

    def chosen_layers(self, depth: int) -> list[int]:
        """The layers whose maps are kept of a model with `depth` layers; ValueError for one that it does not have."""
        layers = list(range(depth)) if self.layers is None else [int(layer) for layer in self.layers]
        for layer in layers:
            if not 0 <= layer < depth:
                raise ValueError(f"--layers {layer} is not between 0 and {depth - 1}")
        return layers


def files_of_results(folder: Path) -> list[Path]:
    """The files in `folder` that have the names of those that `gda eval` writes, results.json first."""
    names = (RESULTS_FILE, MARKDOWN_FILE, HTML_FILE)
    found = sorted(folder.iterdir(), key=lambda each: (each.name != RESULTS_FILE, each)) if folder.is_dir() else []
    return [each for each in found if each.name in names or (each.name.startswith(SAMPLES) and each.suffix == ".jsonl")]


def _task_names(tasks: str | Sequence[str] | None) -> tuple[str, ...]:
    """The names in the order given, without repetitions. Commas separate names as well."""
    given = [tasks] if isinstance(tasks, str) else tasks or []
    names = dict.fromkeys(name.strip() for each in given for name in each.split(",") if name.strip())
    if tasks and not names:
        raise ValueError("--tasks names no task")
    return tuple(names)


def _json_object(option: str, given: dict[str, Any] | str | None) -> dict[str, Any] | None:
    try:
        parsed = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{option} {given:.200} is not JSON: {error}") from None
    if parsed is not None and not isinstance(parsed, dict):
        raise ValueError(f'{option} {given} is not a JSON object such as {{"length": 4096}}')
    return parsed


def _gen_kwargs(given: dict[str, Any] | str | None) -> dict[str, Any] | str | None:
    """A dictionary, or text that lm-eval parses."""
    if not isinstance(given, str) or given.lstrip().startswith("{"):
        return _json_object("--gen-kwargs", given)
    if not all(re.match(r"\s*\w+=", part) for part in given.split(",")):
        raise ValueError(
            f"--gen-kwargs {given} is neither a JSON object nor of the form temperature=0.7,do_sample=true"
        )
    return given
