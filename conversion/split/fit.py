"""Choosing the heads, λ and output projection of one layer after another, from activations on calibration text."""

from collections.abc import Iterator
from dataclasses import asdict

import torch
from transformers import PreTrainedConfig

from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.split.heads import Moments, Split, split_layer
from gda.conversion.split.recipes import LAMBDAS
from gda.conversion.split.rows import Rows
from gda.conversion.split.work import Work
from gda.conversion.tensors.layerwise import LayerwiseModel, layer_prefix

BATCH = 4  # rows that run through a layer at a time
# The first token of a sequence counts so many times. It sees only itself, but the attention sink depends on it. Above
# the layers that form the sink, its state is so large that it hardly counts.
FIRST_TOKEN_WEIGHT = 1000


def fit_layers(source: LayerwiseModel, config: GDAConfig, rows: Rows, *, fitted: int, work: Work) -> Iterator[Split]:
    """Split the heads of one layer after another, except the layers that `work` already holds.

    Moments are computed from the first `fitted` rows. After the last layer, `last_states` returns its outputs.

    Raises:
        ValueError: if a layer of the source gives values that are not finite.
    """
    buffers = _buffers(work, source.config, *rows.ids.shape)
    if not work.has(_name(0)):
        for batch in range(0, len(rows), BATCH):
            buffers[0][batch : batch + BATCH] = source.embed(rows.ids[batch : batch + BATCH])
    for index in range(source.num_layers):
        name = _name(index)
        if not work.has(name):
            entering, leaving = buffers[index % 2], buffers[(index + 1) % 2]
            split = _fit_layer(source, index, config, rows, entering, leaving, fitted)
            facts = {key: value for key, value in asdict(split).items() if key != "output"}
            work.save(name, facts, {"output": split.output.float()})
        yield Split(**work.facts(name), output=work.tensors(name)["output"])


def last_states(source: LayerwiseModel, rows: int, length: int, work: Work) -> torch.Tensor:
    """Outputs of the source's last layer, (rows, length, hidden), once `fit_layers` is done."""
    return _buffers(work, source.config, rows, length)[source.num_layers % 2]


def _name(index: int) -> str:
    return f"layer-{index}"


def _buffers(work: Work, config: PreTrainedConfig, rows: int, length: int) -> list[torch.Tensor]:
    """Inputs and outputs of a layer. They alternate, so a killed run finds the inputs of the layer it was at."""
    return [work.allocate(f"states-{number}", rows, length, config.hidden_size) for number in (0, 1)]


def token_weights(states: torch.Tensor, epsilon: float) -> torch.Tensor:
    """By how much the squared error of each token counts, (sequences, T, 1).

    The norm that follows divides the `states` after the attention, (sequences, T, hidden), by their root mean square.
    """
    weights = 1 / (states.square().mean(dim=-1, keepdim=True) + epsilon)
    weights[:, 0] *= FIRST_TOKEN_WEIGHT
    return weights


@torch.no_grad()
def _fit_layer(
    source: LayerwiseModel,
    index: int,
    config: GDAConfig,
    rows: Rows,
    entering: torch.Tensor,
    leaving: torch.Tensor,
    fitted: int,
) -> Split:
    """Run a layer on `entering`, write its outputs to `leaving`, and split its heads.

    A hook on o_proj collects the moments of the first `fitted` rows.
    """
    tensors = source.tensors(index)
    output = tensors["self_attn.o_proj.weight"]
    bias = tensors.get("self_attn.o_proj.bias", torch.zeros(1, device=output.device))
    moments = Moments(output.shape[1], output.shape[0], source.device)
    batch = states = torch.empty(0)

    def collect(_module: torch.nn.Module, inputs: tuple[torch.Tensor], outputs: torch.Tensor) -> None:
        if not (counts := batch < fitted).any():
            return
        root = token_weights(states + outputs, source.config.rms_norm_eps).sqrt()
        weighted = (inputs[0] * root, (outputs - bias) * root)
        moments.add(*(each.reshape(len(batch), -1, each.shape[-1])[counts] for each in weighted))

    handle = source.layer(index).self_attn.o_proj.register_forward_hook(collect)
    try:
        for batch in rows.batches(BATCH):
            states = rows.sequences(batch, entering[batch].to(source.device))
            leaving[batch] = source.run(index, tensors, states).reshape(len(batch), *entering.shape[1:]).to(leaving)
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
