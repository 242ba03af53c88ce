"""The training log, with measurements of each layer: λ, signal and noise outputs, the subtracted share, gradients."""

import contextlib
import json
import math
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
from gda.common.subtraction import SUMS, measurements, subtraction_measured
from gda.conversion.sources.names import LAYER
from gda.modeling_gda.attention_gda import GDAAttention
from gda.training.parameters import is_lambda
from gda.training.sharding import full_tensor


class LayerLog(TrainerCallback):
    """The training log, a file with one JSON object per line, and the measurements of layers in it.

    Pass it to a `GDATrainer` as `layer_log`. Other Trainers cannot write it, because their callbacks lack the values.

    A line with "layers" has for each layer

    - `lambda`: the mean of λ over tokens and heads;
    - `signal_norm`, `noise_norm`: root mean square of the signal and noise outputs before the subtraction;
    - `subtracted`: |W (λ o_noise)|² / |W (o_signal − λ o_noise)|², the energy of the subtracted part of the layer's
      output relative to that of the difference, as a split reports it. W is the output projection. Growth masks are
      applied; the head norm, which follows, is not;
    - `gradient_norm`, `lambda_gradient_norm`: norms of the gradients of all parameters and of the λ parameters of the
      layer, before clipping; absent where nothing is trained.

    They are measured in the step of the line, over the tokens of all processes and all accumulated batches.

    Args:
        path: The file to write; None to write nothing. A resumed run continues it, without the lines of later steps. A
            new run replaces it.
    """

    def __init__(self, path: str | Path | None):
        self.path = None if path is None else Path(path)
        self.step: int | None = None
        self.sums: Tensor | None = None  # (layers, SUMS)
        self.gradients: list[dict[str, float]] = []

    # ----------------------------------------------------------------------------------------------------------- lines

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Remove the lines of steps that are repeated, and an unfinished line at the end."""
        if self.path is None or not state.is_world_process_zero:
            return
        if state.global_step == 0:
            self.path.unlink(missing_ok=True)
        elif self.path.exists():
            write_text(self.path, "".join(_lines_until(self.path, state.global_step)))

    def write(self, entry: dict[str, Any]) -> None:
        """Append a line. Numbers that are not finite become null."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite(entry), ensure_ascii=False, allow_nan=False) + "\n")

    # -------------------------------------------------------------------------------------------------------- measuring

    @contextlib.contextmanager
    def measuring(self, model: nn.Module, step: int) -> Iterator[None]:
        """Measure the forward passes inside the block, as part of `step`."""
        attentions = [module for module in model.modules() if isinstance(module, GDAAttention)]
        if not attentions:  # a baseline without differential attention
            yield
            return
        if self.step != step or self.sums is None:
            self.step, self.gradients = step, []
            self.sums = torch.zeros(len(attentions), len(SUMS), device=attentions[0].o_proj.weight.device)
        with contextlib.ExitStack() as stack:
            for attention in attentions:
                stack.enter_context(subtraction_measured(attention, self.sums[attention.layer_idx]))
            yield

    def read_gradients(self, model: nn.Module, scale: float = 1.0) -> None:
        """Measure the norms of the model's current gradients, multiplied by `scale`."""
        layers: dict[int, list[tuple[str, Tensor]]] = {}
        for name, parameter in model.named_parameters():
            if (match := LAYER.search(name)) is not None:
                gradients = layers.setdefault(int(match.group(1)), [])
                if parameter.grad is not None:
                    gradients.append((name, parameter.grad))
        self.gradients = []
        for _, named in sorted(layers.items()):
            lambdas = [gradient for name, gradient in named if is_lambda(name)]
            kinds = {"gradient_norm": [gradient for _, gradient in named], "lambda_gradient_norm": lambdas}
            self.gradients.append({kind: scale * _norm(gradients) for kind, gradients in kinds.items() if gradients})

    def collect(self, step: int, reduce: Callable[[Tensor], Tensor]) -> list[dict[str, float]]:
        """The measurements of `step` by layer; empty if it was not measured. `reduce` sums a tensor over processes."""
        if self.step != step or self.sums is None:
            return []
        layers = [
            {"layer": index, **measurements(row), **(self.gradients[index] if self.gradients else {})}
            for index, row in enumerate(reduce(self.sums).tolist())
        ]
        self.step = self.sums = None
        return layers


def for_reporters(layers: list[dict[str, float]]) -> dict[str, float]:
    """The measurements as a flat dictionary for tensorboard, trackio and wandb: layers/00/lambda, …"""
    width = max(2, len(str(len(layers) - 1)))
    return {
        f"layers/{index:0{width}d}/{name}": value
        for index, layer in enumerate(layers)
        for name, value in layer.items()
        if name != "layer"
    }


def _norm(gradients: list[Tensor]) -> float:
    """The norm of all gradients together. If some are sharded, all processes must call this together."""
    sharded = [each for each in gradients if isinstance(each, DTensor)]
    whole = [each for each in gradients if not isinstance(each, DTensor)]
    norms = [get_total_norm(each) for each in (sharded, whole) if each]
    return math.hypot(*(float(full_tensor(each)) for each in norms))


def _lines_until(path: Path, step: int) -> Iterator[str]:
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                yield line
