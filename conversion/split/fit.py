"""Choosing the heads, λ and output projection of one layer after another, from activations on calibration text."""

from collections.abc import Iterator
from dataclasses import asdict

import torch
from transformers import PreTrainedConfig

from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.split.heads import Moments, Split, split_layer
from gda.conversion.split.recipes import LAMBDAS
from gda.conversion.split.work import Work
from gda.conversion.tensors.layerwise import LayerwiseModel, layer_prefix

BATCH = 4  # sequences that run through a layer at a time
MAX_TOKENS = 32768  # that moments are computed from; more tokens change nothing


def fit_layers(
    source: LayerwiseModel, config: GDAConfig, sequences: torch.Tensor, *, fitted: int, work: Work
) -> Iterator[Split]:
    """Split the heads of one layer after another, except the layers that `work` already holds.

    Moments are computed from the first `fitted` of the `sequences`, token ids (sequences, T). After the last layer,
    `last_states` returns its outputs.

    Raises:
        ValueError: if a layer of the source gives values that are not finite.
    """
    buffers = _buffers(work, source.config, *sequences.shape)
    if not work.has(_name(0)):
        for batch in range(0, len(sequences), BATCH):
            buffers[0][batch : batch + BATCH] = source.embed(sequences[batch : batch + BATCH])
    counted = min(fitted, max(1, MAX_TOKENS // sequences.shape[1]))
    for index in range(source.num_layers):
        name = _name(index)
        if not work.has(name):
            entering, leaving = buffers[index % 2], buffers[(index + 1) % 2]
            split = _fit_layer(source, index, config, entering, leaving, counted)
            facts = {key: value for key, value in asdict(split).items() if key != "output"}
            work.save(name, facts, {"output": split.output.float()})
        yield Split(**work.facts(name), output=work.tensors(name)["output"])


def last_states(source: LayerwiseModel, sequences: int, length: int, work: Work) -> torch.Tensor:
    """Outputs of the source's last layer, (sequences, length, hidden), once `fit_layers` is done."""
    return _buffers(work, source.config, sequences, length)[source.num_layers % 2]


def _name(index: int) -> str:
    return f"layer-{index}"


def _buffers(work: Work, config: PreTrainedConfig, sequences: int, length: int) -> list[torch.Tensor]:
    """Inputs and outputs of a layer. They alternate, so a killed run finds the inputs of the layer it was at."""
    return [work.allocate(f"states-{number}", sequences, length, config.hidden_size) for number in (0, 1)]


@torch.no_grad()
def _fit_layer(
    source: LayerwiseModel, index: int, config: GDAConfig, entering: torch.Tensor, leaving: torch.Tensor, counted: int
) -> Split:
    """Run a layer on `entering`, write its outputs to `leaving`, and split its heads.

    A hook on o_proj collects the moments of the first `counted` sequences.
    """
    tensors = source.tensors(index)
    output = tensors["self_attn.o_proj.weight"]
    bias = tensors.get("self_attn.o_proj.bias", torch.zeros(1, device=output.device))
    moments = Moments(output.shape[1], output.shape[0], source.device)
    done = 0

    def collect(_module: torch.nn.Module, inputs: tuple[torch.Tensor], outputs: torch.Tensor) -> None:
        if done < counted:
            moments.add(inputs[0][: counted - done], outputs[: counted - done] - bias)

    handle = source.layer(index).self_attn.o_proj.register_forward_hook(collect)
    try:
        for done in range(0, len(entering), BATCH):
            states = entering[done : done + BATCH].to(source.device)
            leaving[done : done + BATCH] = source.run(index, tensors, states)
    finally:
        handle.remove()
    if not torch.isfinite(moments.heads).all() or not torch.isfinite(moments.cross).all():
        raise _not_finite(index, "self_attn")
    split = split_layer(
        moments,
        output,
        num_noise_heads=config.num_noise_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        lambdas=LAMBDAS[config.lambda_type],
    )
    if not torch.isfinite(leaving).all():
        raise _not_finite(index, "mlp")
    return split


def _not_finite(index: int, module: str) -> ValueError:
    return ValueError(f"{layer_prefix(index)}{module} of the source gives values that are not finite")
