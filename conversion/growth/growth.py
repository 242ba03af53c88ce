"""The options of growth: checks, and the numbers that follow from them and the size of the source."""

from typing import TYPE_CHECKING, Any

from gda.common.options import layer_list

if TYPE_CHECKING:  # the options import this file
    from gda.conversion.options import GrowOptions

FIELDS = ("signal", "hidden", "width", "depth", "layers", "noise_std", "masked", "mlp", "untie", "new_layers")
# Larger factors are typing errors, and merely planning such a model would fill the memory.
LARGEST_FACTOR = 1000


def uniform(options: "GrowOptions") -> dict[str, Any]:
    """Options in a uniform form: factors as integers, and --layers as a list. ValueError for an impossible growth."""
    signal, hidden, mlp, width, masked = options.signal, options.hidden, options.mlp, options.width, options.masked
    layers = layer_list(options.layers)
    if signal is hidden is mlp is width is options.depth is layers is None:
        operators = "--signal, --mlp or --depth" if masked else "--signal, --hidden, --mlp, --depth or --width"
        raise ValueError(f"nothing to grow: pass {operators}")
    for name, given in {"--width": width, "--hidden": hidden}.items():
        if masked and given is not None:
            raise ValueError(f"{name} cannot be masked, because RMSNorm is over all channels; omit --masked or {name}")
    if options.new_layers is not None and (not masked or options.depth is layers is None):
        raise ValueError("--new-layers is for --masked with --depth or --layers")
    if width is not None and (hidden is not None or mlp is not None):
        raise ValueError("--width grows the hidden size and the MLP too; pass --width, or --hidden and --mlp")
    if not makes_replicas(options) and options.noise_std not in (type(options).noise_std, 0):
        cause = "--masked makes none" if masked else "new layers are copies"
        raise ValueError(f"--noise-std {options.noise_std:g} is for replicas, but {cause}; omit it")
    return {
        "signal": _factor("--signal", signal),
        "hidden": _factor("--hidden", hidden),
        "mlp": mlp if masked else _factor("--mlp", mlp),
        "width": _factor("--width", width),
        "layers": layers,
    }


def makes_replicas(options: "GrowOptions") -> bool:
    """Whether a growth repeats heads, neurons or channels."""
    return not options.masked and (options.signal, options.hidden, options.mlp, options.width) != (None,) * 4


def settings(options: "GrowOptions") -> dict[str, Any]:
    """What conversion.json stores of the growth."""
    replicas = makes_replicas(options)  # which the noise is for
    return {name: getattr(options, name) for name in FIELDS if replicas or name != "noise_std"}


def copied_layers(options: "GrowOptions", layers: int) -> list[int]:
    """The layers to copy of a model with `layers` layers, in order; empty if it does not become deeper.

    They are the named ones. By default, the layers are divided into as many equal parts as there are copies, and the
    last one of each part is copied (LLaMA-Pro).

    Raises:
        ValueError: naming the option, for an impossible depth or layer.
    """
    depth, named = options.depth, layer_list(options.layers)
    if depth is not None and depth <= layers:
        raise ValueError(f"--depth {depth} is not more than the {layers} layers of the source")
    if depth is not None and depth > LARGEST_FACTOR * layers:
        raise ValueError(f"--depth {depth} is more than {LARGEST_FACTOR} times the {layers} layers of the source")
    if named is None:
        copies = 0 if depth is None else depth - layers
        return [-(-(copy + 1) * layers // copies) - 1 for copy in range(copies)]
    if wrong := [layer for layer in named if not 0 <= layer < layers]:
        raise ValueError(
            f"--layers {','.join(map(str, wrong))} is not among the {layers} layers of the source, 0 to {layers - 1}"
        )
    if depth is not None and layers + len(named) != depth:
        raise ValueError(f"--layers names {len(named)} layers, but --depth {depth} adds {depth - layers}")
    return sorted(named)


def grown_neurons(times: float, old: int) -> int:
    """`times` the `old` neurons of an MLP; ValueError for a factor that gives no larger whole number."""
    if not 1 < times < float("inf"):
        raise ValueError(f"--mlp {times:g} is not more than 1")
    if times > LARGEST_FACTOR:
        raise ValueError(f"--mlp {times:g} is more than {LARGEST_FACTOR}")
    if abs(times * old - round(times * old)) > 1e-6:
        raise ValueError(f"--mlp {times:g} times the {old} neurons of the source is not a whole number")
    return round(times * old)


def _factor(option: str, times: int | float | None) -> int | None:
    if times is not None and times > LARGEST_FACTOR:
        raise ValueError(f"{option} {times:g} is more than {LARGEST_FACTOR}; grow in several steps")
    if times is not None and not (times >= 2 and times == times // 1):
        hint = "; a fraction needs --masked" if option == "--mlp" else ""
        raise ValueError(f"{option} {times:g} is not an integer of at least 2{hint}")
    return None if times is None else int(times)
