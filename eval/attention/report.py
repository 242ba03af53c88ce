"""The report of `gda attention`: its numbers and maps, and how it is written."""

from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from gda.common.files import written_beside
from gda.common.places import check_output
from gda.common.versions import versions
from gda.eval.attention.analysis import AttentionArrays, MapStatistics
from gda.eval.attention.maps import LayerMaps, MapPlan
from gda.eval.attention.page import PACKAGES, to_html

MOST_CANCELLED = 20  # tokens


@dataclass(frozen=True)
class AttentionReport:
    """A model's attention in one text, and its baseline's if there is one. Notebooks show the page."""

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

    def __repr__(self) -> str:
        baseline = "" if self.baseline_name is None else f", baseline {self.baseline_name}"
        size = f"{len(self.token_ids)} tokens, {self.arrays.num_layers} layers of {self.arrays.num_groups} groups"
        return f"<{type(self).__name__} of {self.name}{baseline}: {size}>"

    def _repr_html_(self) -> str:
        """The page in a frame of its own, for notebooks."""
        return f'<iframe srcdoc="{escape(self.to_html())}" width="100%" height="900" style="border: 0"></iframe>'

    def to_html(self) -> str:
        """A self-contained page: a navigator, maps on hover, and every number of the report."""
        return to_html(self)

    def write_html(self, out: str | Path, *, overwrite: bool = False) -> Path:
        """Write the page. The file appears whole.

        Raises:
            FileExistsError: if `out` exists and `overwrite` is False.
        """
        path = check_output(out, overwrite, "--out")
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(path) as file:
            file.write(self.to_html().encode())
        return path

    def write_png(self, out: str | Path, *, overwrite: bool = False) -> Path:
        """Draw the numbers by layer and the maps of the group that cancels most. The file appears whole.

        Raises:
            FileExistsError: if `out` exists and `overwrite` is False.
            ImportError: without matplotlib.
        """
        from gda.eval.attention.picture import draw  # needs matplotlib, which is optional

        path = check_output(out, overwrite, "--png")
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(path) as file:
            draw(self, file)
        return path


def arrays_to_dict(arrays: AttentionArrays) -> dict[str, Any]:
    """The arrays as lists."""

    def listed(value: Any) -> Any:
        if isinstance(value, MapStatistics):
            return {name: array.tolist() for name, array in vars(value).items()}
        return None if value is None else value.tolist()

    return {name.rstrip("_"): listed(value) for name, value in vars(arrays).items()}
