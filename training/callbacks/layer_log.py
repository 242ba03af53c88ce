"""What each layer does while a model is trained: λ, signal and noise outputs, what is subtracted, and gradients."""

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from gda.common.files import write_text
from gda.common.numbers import finite
from gda.modeling_gda.attention_gda import GDAAttention
from gda.training.parameters import is_lambda

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
MEASURES = ("tokens", "lambda", "signal", "noise", "subtracted", "difference")


class LayerLog(TrainerCallback):
    """A log of training in JSON lines, and what of it is measured in the layers.

    It is written by a `GDATrainer` that is given it as `layer_log`; another Trainer's callbacks know too little.

    A line with "layers" has for each layer

    - `lambda`: the mean of what is subtracted by, over tokens and heads;
    - `signal_norm`, `noise_norm`: root mean square of signal and noise outputs, before the subtraction;
    - `subtracted`: |W (λ o_noise)|² / |W (o_signal − λ o_noise)|², as a split reports it: the energy of what is
      subtracted in the layer's output, relative to that of the difference. W is the output projection; masks of growth
      count, and the norm of heads, which follows, does not;
    - `gradient_norm`, `lambda_gradient_norm`: of the gradients of all parameters of the layer and of those that λ is
      made of, before clipping; absent where nothing learns.

    All are of the step of the line, over all its tokens: of every process and every accumulated part.

    Args:
        path: The file to write; None for none. A training that is resumed goes on with it, without the lines that come
            after the step from which it goes on.
    """

    def __init__(self, path: str | Path | None):
        self.path = None if path is None else Path(path)
        self.step: int | None = None
        self.sums: Tensor | None = None  # (layers, MEASURES), each a mean times the tokens it is of
        self.gradients: list[dict[str, float]] = []

    # ----------------------------------------------------------------------------------------------------------- lines

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave out what an earlier run wrote of steps that come again, and a line that it did not finish."""
        if self.path is None or not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            write_text(self.path, "".join(_lines_until(self.path, state.global_step)))

    def write(self, entry: dict[str, Any]) -> None:
        """Append a line; a number that is not finite becomes null."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite(entry), ensure_ascii=False, allow_nan=False) + "\n")

    # -------------------------------------------------------------------------------------------------------- measuring

    @contextlib.contextmanager
    def listening(self, model: nn.Module, step: int) -> Iterator[None]:
        """While it is entered, forward passes of the model are measured, as part of that step."""
        attentions = [module for module in model.modules() if isinstance(module, GDAAttention)]
        if not attentions:  # the Llama that a GDA model is compared with
            yield
            return
        if self.step != step or self.sums is None:
            self.step, self.gradients = step, []
            self.sums = torch.zeros(len(attentions), len(MEASURES), device=attentions[0].o_proj.weight.device)
        with contextlib.ExitStack() as stack:
            for attention in attentions:
                stack.enter_context(_measuring(attention, self.sums[attention.layer_idx]))
            yield

    def read_gradients(self, model: nn.Module) -> None:
        """Take the norms of the gradients that the model has now."""
        layers: dict[int, list[tuple[str, Tensor]]] = {}
        for name, parameter in model.named_parameters():
            if (match := LAYER.search(name)) is not None:
                gradients = layers.setdefault(int(match.group(1)), [])
                if parameter.grad is not None:
                    gradients.append((name, parameter.grad))
        self.gradients = []
        for _, named in sorted(layers.items()):
            of_lambda = [gradient for name, gradient in named if is_lambda(name)]
            norms = {"gradient_norm": [gradient for _, gradient in named], "lambda_gradient_norm": of_lambda}
            self.gradients.append({name: _norm(each) for name, each in norms.items() if each})

    def collect(self, step: int, reduce: Callable[[Tensor], Tensor]) -> list[dict[str, float]]:
        """What was measured in that step, by layer; nothing if it was not.

        Args:
            step: The step.
            reduce: Sums a tensor over processes.
        """
        if self.step != step or self.sums is None:
            return []
        measured = reduce(self.sums).double().cpu()
        layers = []
        for index, sums in enumerate(measured.tolist()):
            of = dict(zip(MEASURES, sums, strict=True))
            tokens = max(of["tokens"], 1.0)
            layers.append(
                {
                    "layer": index,
                    "lambda": of["lambda"] / tokens,
                    "signal_norm": math.sqrt(of["signal"] / tokens),
                    "noise_norm": math.sqrt(of["noise"] / tokens),
                    "subtracted": of["subtracted"] / max(of["difference"], math.ulp(0)),
                }
                | (self.gradients[index] if self.gradients else {})
            )
        self.step = self.sums = None
        return layers


def for_reporters(layers: list[dict[str, float]]) -> dict[str, float]:
    """The same, as numbers with names: layers/00/lambda, …"""
    width = max(2, len(str(len(layers) - 1)))
    return {
        f"layers/{index:0{width}d}/{name}": value
        for index, layer in enumerate(layers)
        for name, value in layer.items()
        if name != "layer"
    }


@contextlib.contextmanager
def _measuring(attention: GDAAttention, sums: Tensor) -> Iterator[None]:
    """Measure each subtraction of an attention, and add to `sums`, those of its layer."""

    def measure(subtract: Any, inputs: tuple[Tensor, Tensor, Tensor], difference: Tensor) -> None:
        signal, noise, lambda_ = inputs
        # Autocast would keep a narrow copy of the projection's weight, made here without a gradient, for its real use.
        with torch.no_grad(), torch.autocast(signal.device.type, enabled=False):
            whole = subtract.forward(signal.float(), noise.float(), lambda_)  # without this hook
            measured = (
                torch.ones((), device=sums.device),
                lambda_.float().mean(),
                signal.float().square().mean(),
                noise.float().square().mean(),
                _energy(attention, signal.float() - whole),
                _energy(attention, whole),
            )
            sums.add_(torch.stack(measured), alpha=signal.shape[0] * signal.shape[1])

    hook = attention.subtract.register_forward_hook(measure)
    try:
        yield
    finally:
        hook.remove()


def _energy(attention: GDAAttention, heads: Tensor) -> Tensor:
    """Mean square of what heads (B, T, C, S/C, width) write to the residual stream, without the projection's bias."""
    if attention.num_masked_heads:
        heads = attention.mask_new_heads(heads)
    project = attention.o_proj
    heads = heads.flatten(2).to(project.weight.dtype)
    return (project(heads) - project(torch.zeros_like(heads[:1, :1]))).float().square().mean()


def _norm(gradients: list[Tensor]) -> float:
    """Of all of them together; those that are sharded are so over all processes, which must call this together."""
    sharded = [each for each in gradients if isinstance(each, DTensor)]
    whole = [each for each in gradients if not isinstance(each, DTensor)]
    norms = [get_total_norm(each) for each in (sharded, whole) if each]
    return math.hypot(*(float(each.full_tensor() if isinstance(each, DTensor) else each) for each in norms))


def _lines_until(path: Path, step: int) -> Iterator[str]:
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                yield line
