"""The layers of a source, one after another: what their heads give, and how they are divided by that."""

from collections.abc import Iterator
from dataclasses import asdict

import torch
from transformers import PreTrainedConfig

from gda.configuration.configuration_gda import GDAConfig

from ..layerwise import LayerwiseModel, layer_prefix
from .heads import Moments, Split, split_layer
from .work import Work

BATCH = 4  # windows that a layer reads at a time
MOST_TOKENS = 32768  # that moments are taken of: more change nothing


def fit_layers(
    source: LayerwiseModel, config: GDAConfig, windows: torch.Tensor, *, fitted: int, lambdas: list[float], work: Work
) -> Iterator[Split]:
    """Divide the heads of one layer after another; those that `work` has are not done again.

    When the last layer is done, `last_states` are what it gave.

    Args:
        source: The source.
        config: Of the result.
        windows: Ids (windows, T).
        fitted: How many of them, from the first on, moments may be taken of.
        lambdas: λ to try.
        work: Where results and activations lie.
    """
    buffers = _buffers(work, source.config, windows)
    if not work.has(_name(0)):
        for batch in range(0, len(windows), BATCH):
            buffers[0][batch : batch + BATCH] = source.embed(windows[batch : batch + BATCH])
    counted = min(fitted, max(1, MOST_TOKENS // windows.shape[1]))
    for index in range(source.num_layers):
        name = _name(index)
        if not work.has(name):
            entering, leaving = buffers[index % 2], buffers[(index + 1) % 2]
            split = _fit_layer(source, index, config, entering, leaving, counted, lambdas)
            facts = {key: value for key, value in asdict(split).items() if key != "output"}
            work.save(name, facts, {"output": split.output.float()})
        yield Split(**work.facts(name), output=work.tensors(name)["output"])


def last_states(source: LayerwiseModel, windows: torch.Tensor, work: Work) -> torch.Tensor:
    """What the last layer of the source gives, (windows, T, hidden), once `fit_layers` is done."""
    return _buffers(work, source.config, windows)[source.num_layers % 2]


def _name(index: int) -> str:
    return f"layer-{index}"


def _buffers(work: Work, config: PreTrainedConfig, windows: torch.Tensor) -> list[torch.Tensor]:
    """What goes into a layer and what comes out of it: each is kept until the layer after the next, for a kill."""
    return [work.allocate(f"states-{number}", *windows.shape, config.hidden_size) for number in (0, 1)]


@torch.no_grad()
def _fit_layer(
    source: LayerwiseModel,
    index: int,
    config: GDAConfig,
    entering: torch.Tensor,
    leaving: torch.Tensor,
    counted: int,
    lambdas: list[float],
) -> Split:
    tensors = source.tensors(index)
    output = tensors["self_attn.o_proj.weight"]
    bias = tensors.get("self_attn.o_proj.bias", torch.zeros(1, device=source.device))
    moments = Moments(output.shape[1], output.shape[0], source.device)
    seen = 0

    def count(_module: torch.nn.Module, inputs: tuple[torch.Tensor], outputs: torch.Tensor) -> None:
        left = max(0, counted - seen)
        moments.add(inputs[0][:left], (outputs - bias)[:left])

    hook = source.layer(index).self_attn.o_proj.register_forward_hook(count)
    try:
        for batch in range(0, len(entering), BATCH):
            states = entering[batch : batch + BATCH].to(source.device)
            leaving[batch : batch + BATCH] = source.run(index, tensors, states)
            seen += len(states)
    finally:
        hook.remove()
    if not torch.isfinite(moments.heads).all() or not torch.isfinite(moments.cross).all():
        raise ValueError(f"{layer_prefix(index)}self_attn of the source gives values that are not finite")
    if not torch.isfinite(leaving).all():
        raise ValueError(f"{layer_prefix(index)}mlp of the source gives values that are not finite")
    return split_layer(
        moments,
        output,
        num_noise_heads=config.num_noise_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        lambdas=lambdas,
    )
