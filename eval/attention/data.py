"""The numbers and maps of `gda attention`."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gda.common.versions import versions
from gda.eval.attention.analysis import AttentionArrays, MapStatistics
from gda.eval.attention.maps import LayerMaps, MapPlan

MOST_CANCELLED = 20  # tokens
PACKAGES = ("torch", "transformers")


@dataclass(frozen=True)
class AttentionData:
    """A model's attention in one text, and its baseline's if there is one."""

    name: str
    baseline_name: str | None
    text_name: str  # where the text is from
    token_ids: list[int]  # ids of the T tokens
    tokens: list[str]  # the tokens as text, with visible spaces and line ends
    arrays: AttentionArrays
    baseline: AttentionArrays | None
    lambda_type: str | None  # λ type of the model; None without noise heads
    plan: MapPlan  # which maps are kept, and how finely
    maps: dict[int, LayerMaps]  # by layer
    baseline_maps: dict[int, LayerMaps]  # by layer, for the heads that correspond to a group
    notes: list[str] = field(default_factory=list)  # what a reader of the numbers should know

    @property
    def signal_heads_per_group(self) -> int:
        """Number of signal heads in a group."""
        return int(self.arrays.signal.entropy.shape[1]) // self.arrays.num_groups

    @property
    def baseline_heads(self) -> int:
        """Number of heads of the baseline that correspond to a group; 0 without a baseline."""
        if self.baseline is None:
            return 0
        heads = int(self.baseline.signal.entropy.shape[1])
        return heads // self.arrays.num_groups if heads % self.arrays.num_groups == 0 else heads

    def most_cancelled(self, layer: int | None = None, group: int | None = None) -> list[dict[str, Any]]:
        """The tokens whose attention is cancelled most, in descending order. Empty without noise heads.

        Args:
            layer: Layer to look at. Default: the mean over all layers.
            group: Group to look at. Default: the mean over all groups.
        """
        if self.arrays.cancelled is None:
            return []
        received, cancelled = (
            array[slice(None) if layer is None else [layer]][:, slice(None) if group is None else [group]].mean(
                axis=(0, 1)
            )
            for array in (self.arrays.received, self.arrays.cancelled)
        )
        order = np.argsort(-cancelled, kind="stable")[:MOST_CANCELLED]
        return [
            {
                "position": int(at),
                "token": self.tokens[at],
                "received": float(received[at]),
                "cancelled": float(cancelled[at]),
            }
            for at in order
            if cancelled[at] > 0
        ]

    def to_dict(self) -> dict[str, Any]:
        """The numbers as JSON-ready values, without the maps."""
        return {
            "model": self.name,
            "baseline": self.baseline_name,
            "text": self.text_name,
            "token_ids": self.token_ids,
            "tokens": self.tokens,
            "layers": self.arrays.num_layers,
            "groups": self.arrays.num_groups,
            "signal_heads_per_group": self.signal_heads_per_group,
            "lambda_type": self.lambda_type,
            "attention": arrays_to_dict(self.arrays),
            "baseline_attention": None if self.baseline is None else arrays_to_dict(self.baseline),
            "most_cancelled": self.most_cancelled(),
            "maps": {
                "layers": list(self.plan.layers),
                "pool": self.plan.pool,
                "each_head": self.plan.heads,
            },
            "versions": versions(*PACKAGES),
            "notes": self.notes,
        }


def arrays_to_dict(arrays: AttentionArrays) -> dict[str, Any]:
    """The arrays as lists."""

    def listed(value: Any) -> Any:
        if isinstance(value, MapStatistics):
            return {name: array.tolist() for name, array in vars(value).items()}
        return None if value is None else value.tolist()

    return {name.rstrip("_"): listed(value) for name, value in vars(arrays).items()}
