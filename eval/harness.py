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
        kwargs: HFLM's.
    """

    def __init__(
        self,
        pretrained: Any,
        backend: str = "causal",
        device: str | None = None,
        show_prompts: int = 0,
        **kwargs: Any,
    ) -> None:
        self._show_prompts = int(show_prompts)
        self.shown: list[ShownPrompt] = []
        super().__init__(pretrained, backend=backend, device=device or default_device(), **kwargs)

    # HFLM takes part in `accelerate launch` only with more than one GPU; here the processes may be CPUs as well.
    @property
    def rank(self) -> int:
        return self.accelerator.process_index if hasattr(self, "accelerator") else super().rank

    @property
    def world_size(self) -> int:
        return self.accelerator.num_processes if hasattr(self, "accelerator") else super().world_size

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._wanted = self._first_of_each_task(requests)
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        for index, task in self.__dict__.pop("_wanted", {}).items():
            (prompt, continuation), prompt_ids, continuation_ids = requests[index]
            self.shown.append(ShownPrompt(task, prompt, continuation, prompt_ids, continuation_ids))
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        for index, task in self._first_of_each_task(requests).items():
            prompt = requests[index].args[0]
            ids, mask = self.tok_batch_encode([prompt])
            self.shown.append(ShownPrompt(task, prompt, None, ids[mask.bool()].tolist(), None))
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

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
