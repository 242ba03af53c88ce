"""What a model predicts, and what its subtraction does, on text that nothing was fitted to."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from ..layerwise import LayerwiseModel

BATCH = 4  # windows at a time


@dataclass
class Measured:
    """Of a GDA model, on some text.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of every token but the first of each window.
        lambda_: Mean of λ, by layer.
        subtracted: |W (λ o_noise)|² / |W (o − λ o_noise)|², by layer: what the subtraction contributes.
    """

    perplexity: float = math.nan
    lambda_: list[float] = field(default_factory=list)
    subtracted: list[float] = field(default_factory=list)


@torch.no_grad()
def measure(
    model: LayerwiseModel, tensors: Callable[[int], Mapping[str, torch.Tensor]], windows: torch.Tensor
) -> Measured:
    """Run a GDA model, whose layers have those tensors, on ids (windows, T)."""
    measured = Measured()
    states = list(model.embed(windows).split(BATCH))
    for index in range(model.num_layers):
        layer = tensors(index)
        with _RecordSubtraction(model.layer(index).self_attn, layer["self_attn.o_proj.weight"]) as record:
            states = [model.run(index, layer, each) for each in states]
        measured.lambda_.append(record.lambda_ / len(states))
        measured.subtracted.append(record.noise / max(record.difference, math.ulp(0)))
    measured.perplexity = perplexity(model, windows, torch.cat(states))
    return measured


@torch.no_grad()
def perplexity(model: LayerwiseModel, windows: torch.Tensor, states: torch.Tensor) -> float:
    """Perplexity of ids (windows, T), given what goes into the last norm, (windows, T, hidden)."""
    head = model.head()
    total = sum(
        cross_entropy(head(each[:-1].to(model.device)), ids[1:].to(model.device), reduction="sum").item()
        for ids, each in zip(windows, states, strict=True)
    )
    return math.exp(min(total / windows[:, 1:].numel(), 700.0))


class _RecordSubtraction:
    """While entered, records λ and the energies of λ · noise and of the difference in an attention's output."""

    def __init__(self, attention: Any, output: torch.Tensor):
        self.attention, self.output = attention, output
        self.lambda_ = self.noise = self.difference = 0.0

    def __enter__(self) -> "_RecordSubtraction":
        self.hook = self.attention.subtract.register_forward_hook(self._record)
        return self

    def __exit__(self, *_: object) -> None:
        self.hook.remove()

    def _record(
        self, subtract: Any, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], difference: torch.Tensor
    ) -> None:
        signal, noise, lambda_ = inputs
        self.lambda_ += lambda_.mean().item()
        self.noise += self._energy(subtract.forward(torch.zeros_like(signal), noise, lambda_))  # without this hook
        self.difference += self._energy(difference)

    def _energy(self, heads: torch.Tensor) -> float:
        return (heads.flatten(2) @ self.output.T).square().mean().item()
