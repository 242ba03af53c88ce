"""The page of `gda attention`. It holds all its data, the maps compressed, and draws them on demand."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gda.common.html import page
from gda.common.versions import versions
from gda.eval.attention.analysis import AttentionArrays
from gda.eval.attention.maps import LayerMaps, deflated

if TYPE_CHECKING:  # the report imports this file
    from gda.eval.attention.report import AttentionReport

PACKAGES = ("torch", "transformers")
TEMPLATES = Path(__file__).parent / "templates"
DIGITS = 6  # as many as float32 has


def to_html(report: "AttentionReport") -> str:
    """The page as text. Names, tokens and texts are data in it, and are always shown as text."""
    layers = [_packed(report, layer) for layer in range(report.arrays.num_layers)]
    megabytes = sum(map(len, layers)) / 1e6
    return page(
        TEMPLATES / "attention.html.jinja",
        style=TEMPLATES / "attention.css",
        script=TEMPLATES / "attention.js",
        data=_data(report),
        report=report,
        packed=layers,
        facts=[*_facts(report), ("size", f"{megabytes:.1f} MB of maps in this file, compressed, 8 bits per value")],
        notes=report.notes,
    )


def _facts(report: "AttentionReport") -> list[tuple[str, str]]:
    baseline = [] if report.baseline_name is None else [("baseline", report.baseline_name)]
    return [
        ("model", report.name),
        *baseline,
        ("text", f"{report.text_name}, {len(report.token_ids):,} tokens"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions(*PACKAGES).items())),
    ]


def _packed(report: "AttentionReport", layer: int) -> str:
    """Data of one layer: received and cancelled (G, T) in float32, then scales and levels of its maps."""
    arrays = report.arrays
    parts = [arrays.received[layer]]
    if arrays.cancelled is not None:
        parts.append(arrays.cancelled[layer])
    kept = [maps for maps in (report.maps.get(layer), report.baseline_maps.get(layer)) if maps is not None]
    return deflated(*parts, *(maps.scales for maps in kept), *(maps.levels for maps in kept))


def _data(report: "AttentionReport") -> dict[str, Any]:
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
        "baselineAttention": None if report.baseline is None else _measures(report.baseline),
        "received": _rounded(arrays.received.mean(axis=(0, 1))),
        "cancelled": None if arrays.cancelled is None else _rounded(arrays.cancelled.mean(axis=(0, 1))),
        "cancelledShare": None if arrays.cancelled is None else _rounded(arrays.cancelled.sum(axis=-1)),
    }


def _kinds(maps: dict[int, LayerMaps]) -> list[dict[str, Any]]:
    kinds = next(iter(maps.values())).kinds if maps else []
    return [{"name": kind.name, "signed": kind.signed} for kind in kinds]


def _measures(arrays: AttentionArrays) -> dict[str, Any]:
    measures: dict[str, Any] = {"lambda": None if arrays.lambda_ is None else _rounded(arrays.lambda_)}
    for kind in ("signal", "noise", "difference"):
        statistics = getattr(arrays, kind)
        measures[kind] = statistics and {name: _rounded(values) for name, values in vars(statistics).items()}
    return measures


def _rounded(values: np.ndarray) -> Any:
    """The values as lists, without digits that float32 does not have."""
    if values.ndim > 1:
        return [_rounded(row) for row in values]
    return [float(f"{value:.{DIGITS}g}") for value in values.tolist()]
