"""The page of `gda attention`: what it shows is in it, the maps compressed, and is drawn when it is asked for."""

from pathlib import Path
from typing import Any

import numpy as np

from gda.common.html import page
from gda.eval.attention.analysis import AttentionArrays
from gda.eval.attention.maps import deflated
from gda.eval.attention.report import AttentionReport, LayerMaps, versions

TEMPLATES = Path(__file__).parent / "templates"
DIGITS = 6


def to_html(report: AttentionReport) -> str:
    """The page. Every name, token and text is data in it, and is shown as text."""
    layers = [_packed(report, layer) for layer in range(report.arrays.num_layers)]
    megabytes = sum(map(len, layers)) / 1e6
    return page(
        TEMPLATES / "attention.html.jinja",
        style=TEMPLATES / "attention.css",
        script=TEMPLATES / "attention.js",
        data=_data(report),
        report=report,
        packed=layers,
        facts=[*_facts(report), ("size", f"{megabytes:.1f} MB of maps in this file, compressed, in 8 bits a value")],
        notes=report.notes,
    )


def _facts(report: AttentionReport) -> list[tuple[str, str]]:
    told = [("model", report.name)]
    if report.baseline_name is not None:
        told.append(("baseline", report.baseline_name))
    told.append(("text", f"{report.text_name}, {len(report.token_ids):,} tokens"))
    told.append(("versions", ", ".join(f"{name} {version}" for name, version in versions().items())))
    return told


def _packed(report: AttentionReport, layer: int) -> str:
    """One layer: (G, T) received and cancelled in float32; then the maps, scales before levels, the baseline's last."""
    arrays = report.arrays
    parts = [arrays.received[layer]]
    if arrays.cancelled is not None:
        parts.append(arrays.cancelled[layer])
    kept = [one for one in (report.maps.get(layer), report.baseline_maps.get(layer)) if one is not None]
    return deflated(*parts, *(one.scales for one in kept), *(one.levels for one in kept))


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
        "baselineAttention": None if report.baseline is None else _measures(report.baseline),
        "received": _rounded(arrays.received.mean(axis=(0, 1))),
        "cancelled": None if arrays.cancelled is None else _rounded(arrays.cancelled.mean(axis=(0, 1))),
        "cancelledShare": None if arrays.cancelled is None else _rounded(arrays.cancelled.sum(axis=-1)),
    }


def _kinds(maps: dict[int, LayerMaps]) -> list[dict[str, Any]]:
    kinds = next(iter(maps.values())).kinds if maps else []
    return [{"name": kind.name, "signed": kind.signed} for kind in kinds]


def _measures(arrays: AttentionArrays) -> dict[str, Any]:
    told: dict[str, Any] = {"lambda": None if arrays.lambda_ is None else _rounded(arrays.lambda_)}
    for kind in ("signal", "noise", "difference"):
        measured = getattr(arrays, kind)
        told[kind] = measured and {name: _rounded(values) for name, values in vars(measured).items()}
    return told


def _rounded(values: np.ndarray) -> Any:
    """As lists, of numbers with as many digits as float32 has."""
    if values.ndim > 1:
        return [_rounded(row) for row in values]
    return [float(f"{value:.{DIGITS}g}") for value in values.tolist()]
