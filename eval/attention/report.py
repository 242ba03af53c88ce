"""The report of `gda attention`: its numbers and maps, and how it is written.

The page holds all its data, the maps compressed, and draws them on demand.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gda.common.files import written_beside
from gda.common.html import page
from gda.common.places import check_output
from gda.common.versions import versions
from gda.eval.attention.analysis import AttentionArrays, MapStatistics
from gda.eval.attention.maps import LayerMaps, MapPlan, deflated

PACKAGES = ("torch", "transformers")
TEMPLATES = Path(__file__).parent / "templates"
MOST_CANCELLED = 20  # tokens
DIGITS = 6  # as many as float32 has


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

    def kept_maps(self, layer: int) -> list[LayerMaps]:
        """The maps kept of a layer: those of the model and those of the baseline, where there are any."""
        return [maps for maps in (self.maps.get(layer), self.baseline_maps.get(layer)) if maps is not None]

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
            "attention": _lists(self.arrays),
            "baseline_attention": _lists(self.baseline),
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
        """A self-contained page: a navigator, maps on hover, and every number of the report.

        Names, tokens and texts are data in it, and are always shown as text.
        """
        layers = [_packed(self, layer) for layer in range(self.arrays.num_layers)]
        megabytes = sum(map(len, layers)) / 1e6
        return page(
            TEMPLATES / "attention.html.jinja",
            style=TEMPLATES / "attention.css",
            script=TEMPLATES / "attention.js",
            data=_data(self),
            report=self,
            packed=layers,
            facts=[*_facts(self), ("size", f"{megabytes:.1f} MB of maps in this file, compressed, 8 bits per value")],
            notes=self.notes,
        )

    def write_html(self, out: str | Path, *, overwrite: bool = False) -> Path:
        """Write the page. The file appears whole.

        Raises:
            FileExistsError: if `out` exists and `overwrite` is False.
        """
        return _write(out, overwrite, "--out", lambda file: file.write(self.to_html().encode()))

    def write_png(self, out: str | Path, *, overwrite: bool = False) -> Path:
        """Draw the numbers by layer and the maps of the group that cancels most. The file appears whole.

        Raises:
            FileExistsError: if `out` exists and `overwrite` is False.
            ImportError: without matplotlib.
        """
        from gda.eval.attention.picture import draw  # needs matplotlib, which is optional

        return _write(out, overwrite, "--png", lambda file: draw(self, file))


def _write(out: str | Path, overwrite: bool, option: str, write: Callable[[BinaryIO], Any]) -> Path:
    path = check_output(out, overwrite, option)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as file:
        write(file)
    return path


def _lists(value: Any, as_list: Callable[[np.ndarray], Any] = np.ndarray.tolist) -> Any:
    """An array, or the fields of an object with arrays, as lists; None stays None."""
    if value is None:
        return None
    if isinstance(value, AttentionArrays | MapStatistics):
        return {name.rstrip("_"): _lists(each, as_list) for name, each in vars(value).items()}
    return as_list(value)


def _facts(report: AttentionReport) -> list[tuple[str, str]]:
    baseline = [] if report.baseline_name is None else [("baseline", report.baseline_name)]
    return [
        ("model", report.name),
        *baseline,
        ("text", f"{report.text_name}, {len(report.token_ids):,} tokens"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions(*PACKAGES).items())),
    ]


def _packed(report: AttentionReport, layer: int) -> str:
    """Data of one layer: received and cancelled (G, T) in float32, then scales and levels of its maps."""
    arrays = report.arrays
    parts = [arrays.received[layer]]
    if arrays.cancelled is not None:
        parts.append(arrays.cancelled[layer])
    kept = report.kept_maps(layer)
    return deflated(*parts, *(maps.scales for maps in kept), *(maps.levels for maps in kept))


def _data(report: AttentionReport) -> dict[str, Any]:
    arrays = report.arrays
    return {
        "model": report.name,
        "baseline": report.baseline_name,
        "baselineHeads": report.baseline_heads,
        "tokens": report.tokens,
        "layers": arrays.num_layers,
        "groups": arrays.num_groups,
        "heads": report.signal_heads_per_group,
        "lambdaType": report.lambda_type,
        "pool": report.plan.pool,
        "size": report.plan.size,
        "kinds": _kinds(report.maps),
        "baselineKinds": _kinds(report.baseline_maps),
        "mapped": list(report.plan.layers),
        "attention": _measures(arrays),
        "baselineAttention": _measures(report.baseline),
        "received": _rounded(arrays.received.mean(axis=(0, 1))),
        "cancelled": None if arrays.cancelled is None else _rounded(arrays.cancelled.mean(axis=(0, 1))),
        "cancelledShare": None if arrays.cancelled is None else _rounded(arrays.cancelled.sum(axis=-1)),
    }


def _kinds(maps: dict[int, LayerMaps]) -> list[dict[str, Any]]:
    kinds = next(iter(maps.values())).kinds if maps else []
    return [{"name": kind.name, "signed": kind.signed} for kind in kinds]


def _measures(arrays: AttentionArrays | None) -> dict[str, Any] | None:
    """λ and the statistics; the arrays with a value for each token are too large to be here."""
    names = ("lambda_", "signal", "noise", "difference")
    if arrays is None:
        return None
    return {name.rstrip("_"): _lists(getattr(arrays, name), _rounded) for name in names}


def _rounded(values: np.ndarray) -> Any:
    """The values as lists, without digits that float32 does not have."""
    if values.ndim > 1:
        return [_rounded(row) for row in values]
    return [float(f"{value:.{DIGITS}g}") for value in values.tolist()]
