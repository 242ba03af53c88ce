"""The model type "gda" of lm-evaluation-harness. Importing this module registers it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

import gda  # noqa: F401 - with it, model folders of type "gda" load without trust_remote_code

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(
        f"evaluation needs lm-eval: pip install 'grouped-differential-attention[eval]' ({error})"
    ) from None


@dataclass(frozen=True)
class ShownPrompt:
    """One request as the model got it.

    Attributes:
        task: Its task.
        prompt: The text in front, chat template and few-shot examples included.
        continuation: The text that is scored; None where text is generated.
        prompt_ids, continuation_ids: The tokens, BOS included.
    """

    task: str
    prompt: str
    continuation: str | None
    prompt_ids: list[int]
    continuation_ids: list[int] | None

    def to_dict(self) -> dict[str, Any]:
        """The prompt as JSON-ready values."""
        return asdict(self)


@register_model("gda")
class GDALM(HFLM):
    """lm-eval's HFLM for decoder-only models, with a device that is there and with `import gda` done.

    Args:
        pretrained: A model folder, a Hub id or a model in memory.
        backend: "causal".
        device: By default a GPU if there is one, else the CPU.
        show_prompts: How many requests of each task to keep in `shown`.
        progress: Whether lm-eval draws its bars.
        kwargs: HFLM's.
    """

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
        self._kept: dict[int, str] = {}  # task by index of the requests to show
        self._encoded: dict[str, list[int]] = {}  # token ids by text of those to show
        super().__init__(pretrained, backend=backend, device=device or default_device(), **kwargs)

    # HFLM takes part in `accelerate launch` only with more than one GPU; here the processes may be CPUs as well.
    @property
    def rank(self) -> int:
        return self.accelerator.process_index if hasattr(self, "accelerator") else super().rank

    @property
    def world_size(self) -> int:
        return self.accelerator.num_processes if hasattr(self, "accelerator") else super().world_size

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._kept = self._first_of_each_task(requests)
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not self._progress)

    def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        for index, task in self._kept.items():
            (prompt, continuation), prompt_ids, continuation_ids = requests[index]
            room = self.max_length + 1 - len(continuation_ids)  # what is longer is cut at its beginning
            self.shown.append(ShownPrompt(task, prompt, continuation, prompt_ids[-room:], continuation_ids))
        self._kept = {}
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        kept = self._first_of_each_task(requests)
        self._encoded = {requests[index].args[0]: [] for index in kept}
        generated = super().generate_until(requests, disable_tqdm=disable_tqdm or not self._progress)
        for index, task in kept.items():
            prompt = requests[index].args[0]
            self.shown.append(ShownPrompt(task, prompt, None, self._encoded[prompt], None))
        return generated

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = super().tok_batch_encode(strings, *args, **kwargs)
        for string, row, real in zip(strings, ids, mask.bool(), strict=True):
            if string in self._encoded:
                self._encoded[string] = row[real].tolist()
        return ids, mask

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm or not self._progress)

    def _first_of_each_task(self, requests: list[Instance]) -> dict[int, str]:
        """By index in `requests`, the tasks of the requests to keep."""
        kept: dict[int, str] = {}
        for index, request in enumerate(requests if self._show_prompts else []):
            if list(kept.values()).count(request.task_name) < self._show_prompts:
                kept[index] = request.task_name
        return kept


def default_device() -> str:
    """ "cuda" if there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"
