"""Perplexity of a split model on held-out text, and how much its subtraction contributes."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from gda.common.perplexity import mean_perplexity
from gda.conversion.tensors.layerwise import LayerwiseModel

BATCH = 4  # sequences at a time


@dataclass
class Measurements:
    """Measurements of a GDA model on some text.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of every token but the first of each sequence.
        lambda_: Mean λ of each layer.
        subtracted: |W (λ o_noise)|² / |W (o − λ o_noise)|² of each layer: energy of the subtracted part.
    """

    perplexity: float = math.nan
    lambda_: list[float] = field(default_factory=list)
    subtracted: list[float] = field(default_factory=list)


@torch.no_grad()
def measure(
    model: LayerwiseModel, tensors: Callable[[int], Mapping[str, torch.Tensor]], sequences: torch.Tensor
) -> Measurements:
    """Run a GDA model with the given tensors of each layer on ids (sequences, T)."""
    measured = Measurements()
    states = list(model.embed(sequences).split(BATCH))
    for index in range(model.num_layers):
        layer = tensors(index)
        with _RecordSubtraction(model.layer(index).self_attn, layer["self_attn.o_proj.weight"]) as record:
            states = [model.run(index, layer, each) for each in states]
        measured.lambda_.append(record.lambda_ / len(states))
        measured.subtracted.append(record.noise / max(record.difference, math.ulp(0)))
    measured.perplexity = perplexity(model, sequences, torch.cat(states))
    return measured


@torch.no_grad()
def perplexity(model: LayerwiseModel, sequences: torch.Tensor, states: torch.Tensor) -> float:
    """Perplexity of ids (sequences, T), given the inputs of the last norm, (sequences, T, hidden)."""
    head = model.head()
    return mean_perplexity(
        (head(each.to(model.device)), ids.to(model.device)) for ids, each in zip(sequences, states, strict=True)
    )


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
