"""The model type "gda" of lm-evaluation-harness. Importing this module registers it."""

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from rich.progress import TaskID
from tqdm import tqdm

import gda.modeling_gda  # noqa: F401 - registers the model type with the Auto classes
from gda.common.progress import LoggedProgress, logger
from gda.eval.models import Candidate, CompleteOnly, check_tokenizer, choose_device
from gda.eval.options import TaskOptions

GENERATED_TASKS = "gda_"  # how the names of this package's tasks begin


@dataclass(frozen=True)
class ReceivedRequest:
    """One request as the model received it.

    Attributes:
        task: Name of the task.
        prompt: Text before the answer, with chat template and few-shot examples.
        continuation: Text that is scored; None where text is generated.
        prompt_ids, continuation_ids: Their tokens, BOS included.
        cut: Number of tokens cut from the beginning of the prompt because it was too long.
    """

    task: str
    prompt: str
    continuation: str | None
    prompt_ids: list[int]
    continuation_ids: list[int] | None
    cut: int = 0


@register_model("gda")
class GDALM(HFLM):
    """lm-eval's HFLM for decoder-only models.

    Unlike HFLM it refuses checkpoints with missing weights, log-likelihoods that are not finite, and prompts of this
    package's generated tasks that do not fit the model. For other tasks it counts the requests that were cut.

    `received` holds the first `show_prompts` requests of each task. `dropped_system_message`: whether a chat template
    left one out.
    """

    AUTO_MODEL_CLASS: Any

    def __init__(
        self,
        pretrained: Any,
        backend: str = "causal",
        device: str | None = None,
        show_prompts: int = 0,
        progress: bool = True,
        **kwargs: Any,
    ) -> None:
        self._show_prompts = int(show_prompts)
        self._shows_bars = progress
        self.received: list[ReceivedRequest] = []
        self._cut: set[tuple[str, int, int]] = set()  # cut requests: task, document, number
        self._current: list[Instance] = []  # the requests that are being scored
        self._lines = LoggedProgress(disable=True)  # lm-eval has bars of its own
        self._task: TaskID | None = None
        self._rolling_bar: tqdm[Any] | None = None  # lm-eval has one for each batch of rolling log-likelihoods
        self.dropped_system_message = False
        self._generation_ids: dict[str, list[int]] = {}  # token ids of the generation prompts to keep, by prompt
        super().__init__(pretrained, backend=backend, device=device or choose_device(None), **kwargs)
        embeddings = self.model.get_input_embeddings().num_embeddings
        if (self.tokenizer.pad_token_id or 0) >= embeddings:  # attention masks padding, so any other token will do
            others = (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id)
            self.tokenizer.pad_token_id = next((each for each in others if each is not None and each < embeddings), 0)
        if self.custom_prefix_token_id is None:
            check_tokenizer(self.tokenizer, self.tokenizer.name_or_path)

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        auto_class = self.AUTO_MODEL_CLASS
        self.AUTO_MODEL_CLASS = CompleteOnly(auto_class)
        try:
            super()._create_model(*args, **kwargs)
        finally:
            self.AUTO_MODEL_CLASS = auto_class  # lm-eval compares it with transformers' classes

    # HFLM supports `accelerate launch` only with several GPUs; these properties support CPU processes, too.
    @property
    def rank(self) -> int:
        return self.accelerator.process_index if hasattr(self, "accelerator") else super().rank

    @property
    def world_size(self) -> int:
        return self.accelerator.num_processes if hasattr(self, "accelerator") else super().world_size

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._current = requests
        logger.info("scoring %s requests of tasks", f"{len(requests):,}")
        answers = super().loglikelihood(requests, disable_tqdm=disable_tqdm or not self._shows_bars)
        self._check_finite(requests, (value for value, _ in answers))
        return answers

    def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        instances, self._current = self._current, []  # rolling log-likelihoods have none
        for instance, (_, prompt_ids, continuation_ids) in zip(instances, requests, strict=False):
            self._note_if_cut(instance, len(prompt_ids) + len(continuation_ids) - 1, self.max_length)
        for index in self._indices_to_keep(instances):
            (prompt, continuation), prompt_ids, continuation_ids = requests[index]
            cut = max(0, len(prompt_ids) + len(continuation_ids) - self.max_length - 1)
            task, kept_ids = instances[index].task_name, prompt_ids[cut:]
            self.received.append(ReceivedRequest(task, prompt, continuation, kept_ids, continuation_ids, cut))
        if self._rolling_bar is not None:
            answers = super()._loglikelihood_tokens(requests, *args, **(kwargs | {"disable_tqdm": True}))
            self._rolling_bar.update(len(requests))
            self._advance(len(requests))
            return answers
        inputs = {(*prompt_ids, *continuation_ids[:-1]) for _, prompt_ids, continuation_ids in requests}
        with self._progress_lines("scoring", len(inputs)):  # lm-eval runs equal inputs once
            return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits = super()._model_call(inps, *args, **kwargs)
        if self._rolling_bar is None:
            self._advance(len(inps))
        return logits

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        ids = super()._model_generate(context, *args, **kwargs)
        self._advance(len(context))
        return ids

    def _detect_batch_size(self, *args: Any, **kwargs: Any) -> int:
        with self._progress_lines(None, 0):  # what it runs is no request
            return super()._detect_batch_size(*args, **kwargs)

    @contextlib.contextmanager
    def _progress_lines(self, what: str | None, total: int) -> Iterator[None]:
        """Log which share of `total` sequences the model has run, and the time left; nothing if `what` is None."""
        before = self._task
        self._task = None if what is None or self._shows_bars else self._lines.add_task(what, total=total)
        try:
            yield
        finally:
            self._task = before

    def _advance(self, sequences: int) -> None:
        if self._task is not None:
            self._lines.advance(self._task, sequences)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        if self.eot_token_id is None:
            raise ValueError(f"task {requests[0].task_name} generates text, and the tokenizer has no EOS to end it")
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        for request, length in zip(requests, lengths, strict=True):
            new_tokens = normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"]
            self._note_if_cut(request, length, self.max_length - new_tokens)
        logger.info("generating %s answers to tasks", f"{len(requests):,}")
        kept = self._indices_to_keep(requests)
        self._generation_ids = {requests[index].args[0]: [] for index in kept}
        with self._progress_lines("generating", len(requests)):
            texts = super().generate_until(requests, disable_tqdm=disable_tqdm or not self._shows_bars)
        for index in kept:
            prompt = requests[index].args[0]
            ids = self._generation_ids[prompt]
            cut = max(0, lengths[index] - len(ids))
            self.received.append(ReceivedRequest(requests[index].task_name, prompt, None, ids, None, cut))
        return texts

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = super().tok_batch_encode(strings, *args, **kwargs)
        for string, row, real in zip(strings, ids, mask.bool(), strict=True):
            if string in self._generation_ids:
                self._generation_ids[string] = row[real].tolist()
        return ids, mask

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        sequences = sum(-(-len(self.tok_encode(request.args[0])) // self.max_length) for request in requests)
        shown = self._shows_bars and not disable_tqdm and self.rank == 0
        bar = tqdm(total=sequences, disable=not shown, desc="Running loglikelihood_rolling requests")
        with self._progress_lines("scoring", sequences), bar as self._rolling_bar:
            try:
                answers = super().loglikelihood_rolling(requests, disable_tqdm=True)
            finally:
                self._rolling_bar = None
        self._check_finite(requests, answers)
        for index in self._indices_to_keep(requests):
            (text,), task = requests[index].args, requests[index].task_name
            self.received.append(ReceivedRequest(task, "", text, [self.prefix_token_id], self.tok_encode(text)))
        return answers

    def apply_chat_template(self, chat_history: list[dict[str, str]], *args: Any, **kwargs: Any) -> str:
        """As HFLM, which leaves system messages out if the template refuses them; some templates do so themselves."""
        prompt = super().apply_chat_template(chat_history, *args, **kwargs)
        system = [message["content"].strip() for message in chat_history if message["role"] == "system"]
        self.dropped_system_message |= any(text not in prompt for text in system)
        return prompt

    def _batch_scheduler(self, pos: int, n_reordered_requests: Sequence[Any]) -> int:
        """The batch size at a request, found anew for each of N parts of the requests (`--batch-size auto:N`).

        HFLM's fails if there are fewer requests than N, or if a batch contains a whole part.
        """
        part = int(pos * self.batch_schedule) // len(n_reordered_requests)
        if part not in self.batch_sizes:
            last = self.batch_sizes[max(self.batch_sizes)] if self.batch_sizes else None
            grows = last != self.max_batch_size
            self.batch_sizes[part] = self._detect_batch_size(n_reordered_requests, pos) if grows else last
        return self.batch_sizes[part]

    def cut_by_task(self) -> dict[str, int]:
        """Number of cut requests by task: those of all processes in the first process.

        lm-eval repeats the last request of a process, so that all have equally many; it counts once.
        """
        cut = set().union(*filter(None, self.gather_object(self._cut) or []))
        return dict(Counter(task for task, _, _ in cut))

    def _note_if_cut(self, request: Instance, length: int, limit: int) -> None:
        """Note a request that does not fit; ValueError for a generated task, whose answer might be cut."""
        task = request.task_name
        if length <= limit or limit <= 0:  # lm-eval itself refuses a limit of 0
            return
        if task.startswith(GENERATED_TASKS):
            raise ValueError(
                f"task {task}: a prompt of {length} tokens does not fit the model, which has room for {limit}; "
                "omit the task, or ask for shorter prompts with --metadata if the task's length is not fixed"
            )
        self._cut.add((task, request.doc_id, request.idx))

    def _check_finite(self, requests: list[Instance], values: Iterable[float]) -> None:
        """Raise ValueError for a log-likelihood that is not finite: lm-eval would choose the first answer."""
        for request, value in zip(requests, values, strict=True):
            if not math.isfinite(value):
                raise ValueError(
                    f"task {request.task_name}: a log-likelihood is {value}; the weights are damaged, or overflow in "
                    f"{self.model.dtype} (try --dtype float32)"
                )

    def _indices_to_keep(self, requests: list[Instance]) -> list[int]:
        """Indices of the first requests of each task."""
        kept: list[int] = []
        seen: Counter[str] = Counter()
        for index, request in enumerate(requests):
            if seen[request.task_name] < self._show_prompts:
                kept.append(index)
            seen[request.task_name] += 1
        return kept


def load_for_tasks(
    candidate: Candidate, options: TaskOptions, *, show_prompts: int = 0, progress: bool = True
) -> GDALM:
    """Load a model for lm-eval, with the batch size, device and data type of `options`."""
    arguments: dict[str, Any] = {"batch_size": options.batch_size, "tokenizer": candidate.tokenizer}
    arguments |= {"show_prompts": show_prompts, "progress": progress}
    model: Any = str(candidate.place)
    if isinstance(candidate.place, Path) and candidate.gguf is None:
        arguments |= {"device": options.device, "dtype": options.dtype}
    else:
        model = candidate.load(options)
    with candidate.loading():
        return GDALM(model, **arguments)
