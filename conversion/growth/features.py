"""Origins of the features of a grown axis: for each feature of the result, the feature of the source it comes from."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.tensors.axes import sizes

NEW = -1  # a feature without an origin


def of_blocks(blocks: Sequence[int], width: int) -> Tensor:
    """The origins of features in blocks of `width`, given the origins of the blocks."""
    starts = torch.tensor(blocks).unsqueeze(1)
    return torch.where(starts == NEW, NEW, starts * width + torch.arange(width)).flatten()


def signal_origins(config: GDAConfig, times: int, *, replicate: bool) -> dict[str, Tensor]:
    """The origins of features of a model with `times` as many signal heads, by kind of feature.

    Replicas stand next to their original, and so read its KV head: s1 s1′ s2 s2′ n. Heads that are no replicas follow
    each set of signal heads that read the same keys, values and noise: s1 s2 NEW NEW n.
    """
    size, ratio = config.signal_group_size, config.signal_noise_ratio
    signal: list[int] = []
    queries: list[int] = []
    for first in range(0, config.num_signal_heads, size):
        heads = list(range(first, first + size))
        grown = [head for head in heads for _ in range(times)] if replicate else heads + [NEW] * (times - 1) * size
        signal += grown
        queries += [NEW if head == NEW else head // ratio * (ratio + 1) + head % ratio for head in grown]
        if (first + size) % ratio == 0:  # the last set of a group: its noise head follows
            queries.append((first + size) // ratio * (ratio + 1) - 1)
    origins = {
        "query": of_blocks(queries, config.head_dim),
        "output": of_blocks(signal, config.value_width),
        "signal": of_blocks(signal, 1),
    }
    return origins if config.qk_rank is None else origins | {"query rank": of_blocks(queries, config.qk_rank)}


def tiled_origins(config: GDAConfig, times: int, kinds: Collection[str]) -> dict[str, Tensor]:
    """The features of these kinds tiled: whole groups of heads follow whole groups, so each head keeps its KV head."""
    return {kind: torch.arange(size).repeat(times) for kind, size in sizes(config).items() if kind in kinds}


def occurrences(origin: Tensor) -> Tensor:
    """For each feature, how many earlier ones have the same origin."""
    order = origin.argsort(stable=True)
    in_order = origin[order].contiguous()
    earlier = torch.empty_like(origin)
    earlier[order] = torch.arange(len(origin)) - torch.searchsorted(in_order, in_order)
    return earlier


def still_kept(kept: dict[str, Tensor], origins: dict[str, Tensor]) -> dict[str, Tensor]:
    """`kept` after growth: of the features with one origin the first counts as the old feature."""
    grown = {}
    for kind, origin in origins.items():
        first = (origin != NEW) & (occurrences(origin) == 0)
        grown[kind] = first & kept[kind][origin] if kind in kept else first
    return kept | grown
