"""The modes by name: what each converts, and how a conversion is planned, or planned again from conversion.json."""

import contextlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from gda.common.errors import errors_as
from gda.conversion.conversion import Conversion
from gda.conversion.families.llamalike import LLAMALIKES
from gda.conversion.families.registry import DIFFERENTIAL_FAMILIES
from gda.conversion.modes.checks import BrokenTieError, exported
from gda.conversion.options import NO_NOISE_HEADS, NOISE_HEADS, CheckpointOptions, ConvertOptions, GrowOptions
from gda.conversion.sources.source import PROVENANCE_FILE, Source
from gda.conversion.writing.provenance import Settings


@dataclass(frozen=True)
class Mode:
    """A way to make a GDA model of a source, or another model of a GDA model.

    The function `plan(source, options)` of the file modes/NAME.py checks the options against the source and returns the
    conversion.
    """

    sources: Collection[str]  # model types
    needs: str  # tells the user of another type what the mode needs
    # The options by which `plan_again` repeats it; None where bits depend on the machine.
    options_to_repeat: Callable[..., CheckpointOptions] | None = None


DIFFERENTIAL = (*DIFFERENTIAL_FAMILIES, "gda")

MODES = {
    "expand": Mode(LLAMALIKES, f"--mode expand {NO_NOISE_HEADS}", ConvertOptions),
    "split": Mode(LLAMALIKES, f"--mode split {NO_NOISE_HEADS}"),
    "map": Mode(DIFFERENTIAL, f"--mode map {NOISE_HEADS}", ConvertOptions),
    "restore": Mode(LLAMALIKES, "only a plain model can be restored", ConvertOptions),
    "grow": Mode((*LLAMALIKES, *DIFFERENTIAL), "it cannot grow", GrowOptions),
    "fold": Mode(("gda",), "only a GDA model with qk_rank can be folded"),
    "export": Mode(("gda",), "only a GDA model can be exported"),
}


def plan_default(source: Source, options: ConvertOptions) -> Conversion:
    """Plan a conversion by the first mode that converts the source.

    A model that `gda export` wrote is restored, unless it was trained since.
    """
    kind = source.config.model_type
    if exported(source) is not None:
        with contextlib.suppress(BrokenTieError):
            return plan("restore", source, options)
    return plan(next(name for name, mode in MODES.items() if kind in mode.sources), source, options)


def plan(name: str, source: Source, options: CheckpointOptions) -> Conversion:
    """Plan a conversion by the mode `name`, with the options of its command."""
    mode, kind = MODES[name], source.config.model_type
    if kind not in mode.sources:
        raise ValueError(f"{source.name} is a {kind!r} model: {mode.needs}")
    # Imported here, so that a conversion loads no other mode: split and growth are large.
    conversion: Conversion = import_module(f"gda.conversion.modes.{name}").plan(source, options)
    return conversion


def plan_again(source: Source, settings: Settings) -> Conversion:
    """Plan the conversion that the settings in conversion.json describe.

    Raises:
        ValueError: for settings that are not those of a conversion of this source, or whose tensors depend on the
            machine.
    """
    mode = MODES.get(str(settings.mode))
    if mode is None:
        raise ValueError(f"{PROVENANCE_FILE} names the unknown mode {settings.mode!r}")
    if mode.options_to_repeat is None or settings.qk_rank is not None:
        raise ValueError(
            "--method tensors compares bits, and the bits of products, factorizations and fits depend on the machine; "
            "use full or layers"
        )
    kind = source.config.model_type
    if kind not in mode.sources:  # `plan` would name other modes, which a verification has not
        raise ValueError(
            f"{PROVENANCE_FILE} describes a conversion by the mode {settings.mode}, and {source.name} is a {kind!r} "
            "model; name the model that was converted"
        )
    given: dict[str, Any] = {"seed": settings.seed, "dtype": settings.dtype}
    layout: Any = {}
    if kind in LLAMALIKES and settings.mode != "restore":
        given |= {"noise_heads": settings.num_noise_heads, "lambda_type": settings.lambda_type}
        layout = settings.layout or {}
    impossible = f"{PROVENANCE_FILE} describes a conversion that {source.name} does not allow"
    try:
        with errors_as(impossible, ValueError):
            options = mode.options_to_repeat(source.name, "", **given, **layout, **(settings.growth or {}))
            return plan(settings.mode, source, options)
    except TypeError:  # a setting that no growth has, or of another type
        found = given | {"layout": layout, "growth": settings.growth}
        raise ValueError(f"{PROVENANCE_FILE} holds an unknown growth or setting: {found}") from None
