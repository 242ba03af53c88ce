"""New features among old ones, and new layers, with weights as a new model has them: what grows behind a mask."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.modes.expand import LAMBDA_VECTOR_STD

NEW = -1


def features(blocks: Sequence[int], width: int) -> Tensor:
    """For each feature of these blocks of `width`, in their new order, the old one that it is; NEW for a new block."""
    starts = torch.tensor(blocks).unsqueeze(1)
    return torch.where(starts == NEW, NEW, starts * width + torch.arange(width)).flatten()


def signal_features(config: GDAConfig, times: int) -> dict[str, Tensor]:
    """`times` as many signal heads: in each set that reads the same keys, values and noise, new ones after the old."""
    size, ratio = config.signal_group_size, config.signal_noise_ratio
    new = [NEW] * (times - 1) * size
    signal: list[int] = []
    queries: list[int] = []
    for first in range(0, config.num_signal_heads, size):
        heads = range(first, first + size)
        signal += [*heads, *new]
        queries += [*(head // ratio * (ratio + 1) + head % ratio for head in heads), *new]
        if heads.stop % ratio == 0:  # the last set of a group: its noise head follows
            queries.append(heads.stop // ratio * (ratio + 1) - 1)
    kinds = {
        "query": features(queries, config.head_dim),
        "output": features(signal, config.value_width),
        "signal": features(signal, 1),
    }
    return kinds if config.qk_rank is None else kinds | {"query rank": features(queries, config.qk_rank)}


def neuron_features(old: int, new: int) -> Tensor:
    """The neurons of an MLP, and new ones after them."""
    return torch.cat((torch.arange(old), torch.full((new,), NEW)))


def inserted(old: Tensor, axis: int, origin: Tensor, draw: Callable[[], Tensor]) -> Tensor:
    """The tensor with new features among the old ones of `axis`, as `origin` places them.

    Args:
        old: The tensor before.
        axis: Which of its axes.
        origin: As of `features`; old features keep their order.
        draw: Makes the whole new tensor, of which the new features are kept.
    """
    return draw().to(old.dtype).index_copy_(axis, torch.nonzero(origin != NEW).flatten(), old)


def drawn(name: str, shape: tuple[int, ...], config: GDAConfig, generator: torch.Generator) -> Tensor:
    """The tensor `name` in float32 as a model of that configuration is initialized, by `GDAForCausalLM`."""
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if name.endswith(("norm.weight", "subln.weight")):
        return torch.ones(shape)
    if name.endswith("act_fn.weight"):
        return torch.full(shape, 1 / 3)
    std = float(config.initializer_range)
    if ".lambda_" in name and not name.endswith("lambda_proj.weight"):
        std = LAMBDA_VECTOR_STD
    elif name.endswith("_base.weight"):
        std /= 2**0.5
    elif name.endswith("_up.weight"):
        assert config.qk_rank is not None  # there would be no such tensor
        std = (2 * config.qk_rank) ** -0.5
    return std * torch.randn(shape, generator=generator)
