"""The model type "gda" of lm-evaluation-harness. Importing this module registers it."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

import gda.modeling_gda  # noqa: F401 - registers the model type with the Auto classes

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    raise ImportError(
        f"evaluation needs lm-eval: pip install 'grouped-differential-attention[eval]' ({error})"
    ) from None

OUR_TASKS = "gda_"


@dataclass(frozen=True)
class ShownPrompt:
    """One request as the model got it.

    Attributes:
        task: Its task.
        prompt: The text in front, chat template and few-shot examples included.
        continuation: The text that is scored; None where text is generated.
        prompt_ids, continuation_ids: The tokens, BOS included.
        cut: How many tokens of the prompt's beginning the model did not get, for want of room.
    """

    task: str
    prompt: str
    continuation: str | None
    prompt_ids: list[int]
    continuation_ids: list[int] | None
    cut: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The prompt as JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True)
class _Complete:
    """An auto class of transformers that refuses a checkpoint which lacks weights, instead of making them up."""

    auto_class: Any

    def from_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        model, info = self.auto_class.from_pretrained(*args, **kwargs, output_loading_info=True)
        for kind, what in (("missing_keys", "has no"), ("mismatched_keys", "has another shape of")):
            if names := sorted(map(str, info[kind])):
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise ValueError(f"the checkpoint {what} {names[0]}{more}, which its config.json asks for")
        return model


@register_model("gda")
class GDALM(HFLM):
    """lm-eval's HFLM for decoder-only models, with a device that is there and with `import gda` done.

    Unlike HFLM it refuses checkpoints that lack weights, log-likelihoods that are no numbers, and prompts of generated
    tasks that do not fit the model; of other tasks it counts the requests that were cut, in `cut`.

    Args:
        pretrained: A model folder, a Hub id or a model in memory.
        backend: "causal".
        device: By default a GPU if there is one, else the CPU.
        show_prompts: How many requests of each task to keep in `shown`.
        progress: Whether lm-eval draws its bars.
        kwargs: HFLM's.

    Raises:
        ValueError: if weights are missing, or the tokenizer has neither BOS nor EOS.
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
        self._progress = progress
        self.shown: list[ShownPrompt] = []
        self.cut: Counter[str] = Counter()  # requests by task
        self._tasks: list[str] = []  # of the requests under way
        self._kept: dict[int, str] = {}  # task by index of the requests to show
        self._encoded: dict[str, list[int]] = {}  # token ids by text of those to show
        super().__init__(pretrained, backend=backend, device=device or default_device(), **kwargs)
        if self.custom_prefix_token_id is None:
            check_tokenizer(self.tokenizer, self.tokenizer.name_or_path)

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        auto_class = self.AUTO_MODEL_CLASS
        self.AUTO_MODEL_CLASS = _Complete(auto_class)
        try:
            super()._create_model(*args, **kwargs)
        finally:
            self.AUTO_MODEL_CLASS = auto_class  # which lm-eval asks for

    # HFLM takes part in `accelerate launch` only with more than one GPU; here the processes may be CPUs as well.
    @property
    def rank(self) -> int:
        return self.accelerator.process_index if hasattr(self, "accelerator") else super().rank

    @property
    def world_size(self) -> int:
        return self.accelerator.num_processes if hasattr(self, "accelerator") else super().world_size

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._tasks = [request.task_name for request in requests]
        self._kept = self._first_of_each_task(requests)
        found = super().loglikelihood(requests, disable_tqdm=disable_tqdm or not self._progress)
        self._check_finite(requests, (value for value, _ in found))
        return found

    def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        for task, (_, prompt_ids, continuation_ids) in zip(self._tasks, requests, strict=False):
            self._count_cut(task, len(prompt_ids) + len(continuation_ids) - 1, self.max_length)
        for index, task in self._kept.items():
            (prompt, continuation), prompt_ids, continuation_ids = requests[index]
            room = self.max_length + 1 - len(continuation_ids)  # what is longer is cut at its beginning
            cut = max(0, len(prompt_ids) - room)
            self.shown.append(ShownPrompt(task, prompt, continuation, prompt_ids[cut:], continuation_ids, cut))
        self._tasks, self._kept = [], {}
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        if self.eot_token_id is None:
            raise ValueError(f"task {requests[0].task_name} generates text, and the tokenizer has no EOS to end it")
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        for request, length in zip(requests, lengths, strict=True):
            new = normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"]
            self._count_cut(request.task_name, length, self.max_length - new)
        kept = self._first_of_each_task(requests)
        self._encoded = {requests[index].args[0]: [] for index in kept}
        generated = super().generate_until(requests, disable_tqdm=disable_tqdm or not self._progress)
        for index, task in kept.items():
            prompt = requests[index].args[0]
            ids = self._encoded[prompt]
            self.shown.append(ShownPrompt(task, prompt, None, ids, None, max(0, lengths[index] - len(ids))))
        return generated

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = super().tok_batch_encode(strings, *args, **kwargs)
        for string, row, real in zip(strings, ids, mask.bool(), strict=True):
            if string in self._encoded:
                self._encoded[string] = row[real].tolist()
        return ids, mask

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        found = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm or not self._progress)
        self._check_finite(requests, found)
        return found

    def all_cut(self) -> dict[str, int]:
        """`cut` of all processes, in the first; by task, in their order."""
        return dict(sum(filter(None, self.gather_object(self.cut) or []), Counter()))

    def _count_cut(self, task: str, length: int, room: int) -> None:
        """
        Raises:
            ValueError: if a prompt of ours is to be cut, since what is asked for may be in what goes.
        """
        if length <= room or room <= 0:  # without any room lm-eval itself refuses
            return
        if task.startswith(OUR_TASKS):
            raise ValueError(
                f"task {task}: a prompt of {length} tokens does not fit the model, which has room for {room}; "
                "ask for shorter ones with --metadata '{\"length\": …}', or leave the task out"
            )
        self.cut[task] += 1

    def _check_finite(self, requests: list[Instance], values: Iterable[float]) -> None:
        """
        Raises:
            ValueError: for a log-likelihood that is no number, which lm-eval would score as the first choice.
        """
        for request, value in zip(requests, values, strict=True):
            if not math.isfinite(value):
                raise ValueError(
                    f"task {request.task_name}: a log-likelihood is {value}; the weights are damaged, or overflow in "
                    f"{self.model.dtype}, against which --dtype float32 helps"
                )

    def _first_of_each_task(self, requests: list[Instance]) -> dict[int, str]:
        """By index in `requests`, the tasks of the requests to keep."""
        kept: dict[int, str] = {}
        for index, request in enumerate(requests if self._show_prompts else []):
            if list(kept.values()).count(request.task_name) < self._show_prompts:
                kept[index] = request.task_name
        return kept


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """
    Raises:
        ValueError: if there is no token that can stand in front of a text.
    """
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {name} has neither BOS nor EOS, and one must stand in front of a text")


def default_device() -> str:
    """ "cuda" if there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"
