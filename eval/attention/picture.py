"""The picture of `gda attention --png`: numbers by layer, and the maps of the group that cancels most."""

from typing import IO, TYPE_CHECKING, Any

import numpy as np

from gda.common.extras import needed_by
from gda.eval.attention.maps import unpack

if TYPE_CHECKING:  # the report imports this file
    from gda.eval.attention.report import AttentionReport

with needed_by("--png", "png"):
    import matplotlib
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm
    from matplotlib.figure import Figure

COLOURS = {"signal": "#0b65c2", "noise": "#b85c00", "difference": "#7b3fb0", "baseline": "#4c5661"}
BLUE, ORANGE = ["#ffffff", "#549ad6", "#06265c"], ["#ffffff", "#eb9642", "#602800"]
FULL_COLOUR = 0.2  # attention that is drawn in full colour
TITLES = {"entropy": "entropy, nats", "first_token": "share on the first token", "negative": "share that is negative"}
MOST_MAPS = 4


def draw(report: "AttentionReport", file: IO[bytes]) -> None:
    """Draw the picture and write it as PNG."""
    layer, group = _most_cancelling(report)
    maps = _maps(report, layer, group)
    with matplotlib.rc_context({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "text.parse_math": False}):
        figure = Figure(figsize=(13, 8.5), layout="constrained", dpi=150)
        title = f"Attention of {report.name}" + (f" against {report.baseline_name}" if report.baseline_name else "")
        figure.suptitle(f"{title}, {len(report.tokens)} tokens")
        parts: Any = figure.subfigures(2, 1, height_ratios=[1, 1.15])
        above, below = parts
        _by_layer(report, above)
        below.suptitle(f"layer {layer}, group {group}; full colour at {FULL_COLOUR}", fontsize=9)
        axes = below.subplots(1, len(maps), squeeze=False)[0]
        for axis, (name, values) in zip(axes, maps, strict=True):
            _map(axis, name, values, report.plan.pool)
        figure.savefig(file, format="png")


def _most_cancelling(report: "AttentionReport") -> tuple[int, int]:
    """Layer and group that cancel most, among the layers whose maps are kept."""
    layers = list(report.plan.layers)
    if report.arrays.cancelled is None:
        return layers[0], 0
    shares = report.arrays.cancelled.sum(axis=-1)[layers]
    index, group = np.unravel_index(int(shares.argmax()), shares.shape)
    return layers[int(index)], int(group)


def _maps(report: "AttentionReport", layer: int, group: int) -> list[tuple[str, np.ndarray]]:
    found = [
        (kind.name, unpack(kind, float(kept.scales[group, index]), kept.levels[group, index]))
        for kept in report.kept_maps(layer)
        for index, kind in enumerate(kept.kinds)
    ]
    heads = report.signal_heads_per_group
    if len(found) <= MOST_MAPS or not report.plan.heads or heads == 1:
        return found
    means = []  # too many to read: show the mean over heads
    for name in ("signal", "noise", "difference", "baseline"):
        if same := [values for kind, values in found if kind.split(" ")[0] == name]:
            means.append((name if len(same) == 1 else f"{name}, mean of {len(same)} heads", np.mean(same, axis=0)))
    return means


def _by_layer(report: "AttentionReport", figure: Any) -> None:
    arrays = report.arrays
    axes = figure.subplots(1, 4 if arrays.lambda_ is not None else 3)
    if arrays.lambda_ is not None and arrays.cancelled is not None:
        axes[0].plot(arrays.lambda_.mean(axis=1), color=COLOURS["noise"], label="λ, mean over heads")
        cancelled = arrays.cancelled.sum(axis=-1).mean(axis=1)
        axes[0].plot(cancelled, color=COLOURS["difference"], label="share cancelled")
        axes[0].set_title("λ and the share it cancels")
    for axis, (measure, title) in zip(axes[-3:], TITLES.items(), strict=True):
        for kind in ("signal", "noise", "difference"):
            measured = getattr(arrays, kind)
            if measured is not None and (measure != "negative" or kind == "difference"):
                axis.plot(getattr(measured, measure).mean(axis=1), color=COLOURS[kind], label=kind)
        if report.baseline is not None:
            attended = report.baseline.difference or report.baseline.signal
            values = getattr(attended, measure).mean(axis=1)
            axis.plot(values, color=COLOURS["baseline"], linestyle="--", label=report.baseline_name)
        axis.set_title(title)
    for axis in axes:
        axis.set_xlabel("layer")
        if axis.get_lines():
            axis.legend(fontsize=7)


def _map(axis: Any, name: str, values: np.ndarray, pool: int) -> None:
    hidden = np.ma.masked_where(np.triu(np.ones_like(values), 1) > 0, values)
    tokens = len(values) * pool
    where = {"extent": (0, tokens, tokens, 0), "interpolation": "nearest"}
    warm = LinearSegmentedColormap.from_list("noise", ORANGE)
    if name.startswith("noise"):
        axis.imshow(hidden, cmap=warm, norm=PowerNorm(0.5, 0, FULL_COLOUR, clip=True), **where)
    else:
        both = LinearSegmentedColormap.from_list("difference", [*reversed(ORANGE), *BLUE[1:]])
        roots = np.sign(hidden) * np.sqrt(np.abs(hidden) / FULL_COLOUR)
        axis.imshow(roots, cmap=both, vmin=-1, vmax=1, **where)
    axis.set_title(name)
    axis.grid(visible=False)
