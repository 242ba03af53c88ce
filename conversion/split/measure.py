"""Perplexity of a split model on held-out text, and how much its subtraction contributes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from gda.common.perplexity import SequenceLoss, sequence_losses
from gda.common.subtraction import SUMS, measurements, subtraction_measured
from gda.conversion.tensors.layerwise import LayerwiseModel

BATCH = 4  # sequences at a time


@dataclass
class Measurements:
    """Measurements of a GDA model on some text."""

    losses: list[SequenceLoss] = field(default_factory=list)  # without the first token of each sequence
    lambda_: list[float] = field(default_factory=list)  # mean λ of each layer
    subtracted: list[float] = field(default_factory=list)  # |W (λ o_noise)|² / |W (o − λ o_noise)|² of each layer


@torch.no_grad()
def measure(
    model: LayerwiseModel, tensors: Callable[[int], Mapping[str, torch.Tensor]], sequences: torch.Tensor
) -> Measurements:
    """Run a GDA model with the given tensors of each layer on ids (sequences, T)."""
    measured = Measurements()
    states = list(model.embed(sequences).split(BATCH))
    for index in range(model.num_layers):
        layer, sums = tensors(index), torch.zeros(len(SUMS), device=model.device)
        with subtraction_measured(model.layer(index).self_attn, sums):
            states = [model.run(index, layer, each) for each in states]
        of_layer = measurements(sums.tolist())
        measured.lambda_.append(of_layer["lambda"])
        measured.subtracted.append(of_layer["subtracted"])
    measured.losses = losses(model, sequences, torch.cat(states))
    return measured


@torch.no_grad()
def losses(model: LayerwiseModel, sequences: torch.Tensor, states: torch.Tensor) -> list[SequenceLoss]:
    """The loss of each of the ids (sequences, T), given the inputs of the last norm, (sequences, T, hidden)."""
    head = model.head()
    return sequence_losses(
        (head(each.to(model.device)), ids.to(model.device)) for ids, each in zip(sequences, states, strict=True)
    )
