"""`gda eval`: a model and its baseline under one setting."""

import importlib.metadata
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from gda._version import __version__
from gda.common.perplexity import TextPerplexity, text_perplexity
from gda.common.screen import shows_progress
from gda.eval.attention.diagnostics import DiagnosticsReport, diagnose, prompts_by_metadata
from gda.eval.compare import Row, rows_of
from gda.eval.evaluate import check_settings, notes, run_tasks
from gda.eval.lm_eval.find_tasks import load_tasks
from gda.eval.lm_eval.harness import GDALM, ShownPrompt
from gda.eval.models import Candidate, find_model

DEFAULT_CONTEXT = 512  # tokens
PACKAGES = ("torch", "transformers", "lm_eval", "datasets")


@dataclass(frozen=True)
class Setting:
    """What both models run under. The fields of `gda.evaluate` are explained there.

    Attributes:
        perplexity: A text file to read; None for no perplexity.
        context, stride: Of that, in tokens; None for 512 and the context.
        diagnostics: Whether to look into the attention maps, on retrieval prompts.
        show_prompts: How many requests of each task to keep.
    """

    tasks: Sequence[str] = ()
    dataset_root: str | None = None
    limit: int | float | None = None
    num_fewshot: int | None = None
    batch_size: int | str = 1
    device: str | None = None
    dtype: str = "auto"
    apply_chat_template: bool = False
    seed: int | None = None
    metadata: dict[str, Any] | None = None
    perplexity: str | None = None
    context: int | None = None
    stride: int | None = None
    diagnostics: bool = False
    show_prompts: int = 0

    def __post_init__(self) -> None:
        names = ("limit", "num_fewshot", "batch_size", "dtype", "device", "seed")
        check_settings(**{name: getattr(self, name) for name in names})
        if not self.tasks and self.perplexity is None and not self.diagnostics:
            raise ValueError("nothing to do: name --tasks, a text with --perplexity, or --diagnostics")
        if self.perplexity is None and (self.context is not None or self.stride is not None):
            raise ValueError("--context and --stride are those of --perplexity; name its FILE")
        context = DEFAULT_CONTEXT if self.context is None else self.context
        if context < 1:
            raise ValueError(f"--context {context} is not a number of tokens")
        if self.stride is not None and not 0 < self.stride <= context:
            raise ValueError(f"--stride {self.stride} is not from 1 to the context of {context} tokens")
        if self.show_prompts < 0:
            raise ValueError(f"--show-prompts {self.show_prompts} is negative")
        if self.diagnostics:
            prompts_by_metadata(self.metadata or {}, alone=not self.tasks)


@dataclass(frozen=True)
class Outcome:
    """What one model did.

    Attributes:
        name: The model.
        revision: Its commit, for a Hub id.
        results: lm-eval's dictionary; without tasks, one that holds none.
        perplexity: Of the text; None if there was none.
        prompts: The first requests of each task.
        sha256: By file of weights.
        seconds: From loading on.
        dtype: What it ran in.
        notes: What one who reads the numbers ought to know.
    """

    name: str
    revision: str | None
    results: dict[str, Any]
    perplexity: TextPerplexity | None
    prompts: list[ShownPrompt]
    sha256: dict[str, str]
    seconds: float
    dtype: str
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """What lm-eval's results do not say."""
        return {
            "model": self.name,
            "revision": self.revision,
            "sha256": self.sha256,
            "seconds": self.seconds,
            "dtype": self.dtype,
            "notes": self.notes,
            "prompts": [prompt.to_dict() for prompt in self.prompts],
            "perplexity": None if self.perplexity is None else self.perplexity.to_dict(),
        }


@dataclass(frozen=True)
class EvalReport:
    """Everything `gda eval` found.

    Attributes:
        model, baseline: What each did; the baseline's is None without one.
        rows: Scores side by side.
        setting: What both ran under.
        diagnostics: Of the attention maps; None if not asked for.
    """

    model: Outcome
    baseline: Outcome | None
    rows: list[Row]
    setting: Setting
    diagnostics: DiagnosticsReport | None = None

    def notes(self) -> list[tuple[str, str]]:
        """Name and note of each model."""
        outcomes = [outcome for outcome in (self.model, self.baseline) if outcome is not None]
        return [(outcome.name, note) for outcome in outcomes for note in outcome.notes]

    def to_dict(self) -> dict[str, Any]:
        """lm-eval's results of the model as JSON-ready values, and under "gda" all the rest."""
        baseline = None
        if self.baseline is not None:
            baseline = {**_without_samples(self.baseline.results), "gda": self.baseline.to_dict()}
        return {
            **_without_samples(self.model.results),
            "gda": {
                **self.model.to_dict(),
                "settings": asdict(self.setting),
                "versions": {"gda": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES},
                "comparison": [row.to_dict() for row in self.rows],
                "diagnostics": None if self.diagnostics is None else self.diagnostics.to_dict(),
                "baseline": baseline,
            },
        }


def run(
    model: str | Path, baseline: str | Path | None = None, *, setting: Setting, console: Console | None = None
) -> EvalReport | None:
    """Evaluate a model, and its baseline under the same setting.

    Args:
        model, baseline: Folders, Hub ids or `.gguf` files.
        setting: What to do.
        console: Where progress is told; nowhere if None.

    Returns:
        A report; None in all but the first of several processes.

    Raises:
        FileNotFoundError, ValueError: for bad input, in one line that names the remedy.
    """
    first_process = int(os.environ.get("RANK", "0")) == 0
    console = console if console is not None and first_process else Console(quiet=True)
    text = None if setting.perplexity is None else _read_text(Path(setting.perplexity))
    candidates = [find_model(place) for place in (model, baseline) if place is not None]
    if len({candidate.name for candidate in candidates}) < len(candidates):
        places = (str(model), f"{baseline} (baseline)")
        candidates = [replace(candidate, name=name) for candidate, name in zip(candidates, places, strict=True)]
    tasks: list[Any] = []
    if setting.tasks:
        console.print(f"building {', '.join(setting.tasks)}", highlight=False, markup=False)
        told = {"tokenizer": candidates[0].tokenizer} | (setting.metadata or {})
        tasks = load_tasks(setting.tasks, dataset_root=setting.dataset_root, metadata=told)
    outcomes, loaded = [], []
    for candidate in candidates:
        outcome, lm = _run_one(candidate, setting, tasks, text, console)
        outcomes.append(outcome)
        if setting.diagnostics and first_process:
            loaded.append(lm)  # only then may both be in memory at once
        del lm
    if not first_process:
        return None
    ours, theirs = outcomes[0], outcomes[1] if len(outcomes) > 1 else None
    rows = rows_of(ours.results, None if theirs is None else theirs.results)
    return EvalReport(ours, theirs, rows, setting, _diagnose(loaded, setting, console) if loaded else None)


def _run_one(
    candidate: Candidate, setting: Setting, tasks: list[Any], text: str | None, console: Console
) -> tuple[Outcome, GDALM]:
    console.print(f"running {candidate.name}", highlight=False, markup=False)
    begun = time.monotonic()
    hashes = candidate.hashes()
    lm = candidate.load(
        batch_size=setting.batch_size,
        device=setting.device,
        dtype=setting.dtype,
        show_prompts=setting.show_prompts,
        progress=shows_progress(console),
    )
    results: dict[str, Any] = {"results": {}}
    if tasks:
        results = run_tasks(
            lm,
            tasks,
            limit=setting.limit,
            num_fewshot=setting.num_fewshot,
            chat_template=setting.apply_chat_template,
            seed=setting.seed,
        )
    told = notes(lm, results, setting.num_fewshot)
    measured = None if text is None or lm.rank else _measure(lm, text, setting, console)
    if measured is not None and (asked := setting.context or DEFAULT_CONTEXT) > measured.context:
        told.append(f"perplexity: the model takes {measured.context} tokens at a time, not {asked}")
    outcome = Outcome(
        name=candidate.name,
        revision=candidate.revision,
        results=results,
        perplexity=measured,
        prompts=lm.shown,
        sha256=hashes.result(),
        seconds=time.monotonic() - begun,
        dtype=str(lm.model.dtype).removeprefix("torch."),
        notes=told,
    )
    return outcome, lm


def _measure(lm: GDALM, text: str, setting: Setting, console: Console) -> TextPerplexity:
    with Progress(console=console, disable=not shows_progress(console), transient=True) as bar:
        task = bar.add_task("perplexity", total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        context = min(setting.context or DEFAULT_CONTEXT, lm.max_length)
        stride = min(setting.stride or context, context)
        found = text_perplexity(lm.model, lm.tokenizer, text, context=context, stride=stride, advance=advance)
    if math.isnan(found.token):
        raise ValueError(f"--perplexity is {found.token}; the weights are damaged, or overflow in {lm.model.dtype}")
    return found


def _diagnose(loaded: list[GDALM], setting: Setting, console: Console) -> DiagnosticsReport:
    ours, theirs = loaded[0], loaded[1].model if len(loaded) > 1 else None
    told = prompts_by_metadata(setting.metadata or {}, alone=not setting.tasks)
    return diagnose(ours.model, ours.tokenizer, baseline=theirs, console=console, **told)


def _read_text(path: Path) -> str:
    """
    Raises:
        FileNotFoundError, ValueError: naming the file, if it is missing, empty or not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--perplexity {path} is not a file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--perplexity {path} is not UTF-8 text: {error}") from None
    if not text.strip():
        raise ValueError(f"--perplexity {path} is empty")
    return text


def _without_samples(results: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in results.items() if name != "samples"}
