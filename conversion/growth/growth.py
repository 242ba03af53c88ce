"""What a model is asked to grow by, checked as far as that needs no model."""

from dataclasses import asdict, dataclass
from typing import Any

from gda.conversion.options import GrowOptions

DEFAULT_NOISE = 0.01
# A larger factor is a typing error, and planning such a model alone would fill the memory.
LARGEST_FACTOR = 1000


@dataclass(frozen=True)
class Growth:
    """A growth, as the settings in conversion.json hold it.

    Attributes:
        signal: Factor on the number of signal heads.
        width: Factor on the hidden size, the MLP and the numbers of heads.
        depth: Number of layers of the result.
        layers: The layers that are copied, numbered as in the source; a layer named twice is copied twice.
        noise_std: Standard deviation of the noise that tells replicas apart, relative to the weight's.
        masked: Whether new heads, neurons and layers start from random weights behind a mask, instead of as copies.
        mlp: Factor on the number of neurons, if masked.
    """

    signal: int | None = None
    width: int | None = None
    depth: int | None = None
    layers: list[int] | None = None
    noise_std: float = DEFAULT_NOISE
    masked: bool = False
    mlp: float | None = None

    @classmethod
    def of(cls, options: GrowOptions) -> "Growth":
        """The growth that the options ask for.

        Raises:
            ValueError: naming the option, for a growth that no model can have.
        """
        growth = cls(
            signal=_factor("--signal", options.signal),
            width=_factor("--width", options.width),
            depth=options.depth,
            layers=_layers(options.layers),
            noise_std=options.noise_std,
            masked=options.masked,
            mlp=options.mlp,
        )
        growth._check()
        return growth

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready values."""
        return asdict(self)

    def _check(self) -> None:
        if self.signal is self.width is self.depth is self.layers is self.mlp is None:
            operators = "--signal, --mlp or --depth" if self.masked else "--signal, --depth or --width"
            raise ValueError(f"nothing to grow by: give {operators}")
        if self.masked and self.width is not None:
            raise ValueError("--width replicates the whole model, which no mask can hide; omit --masked or --width")
        if self.masked and self.noise_std != DEFAULT_NOISE:
            raise ValueError("--noise-std tells replicas apart, and --masked makes none")
        if self.mlp is not None and not self.masked:
            raise ValueError("--mlp adds new neurons, which only --masked can hide; --width replicates them")
        if not 0 <= self.noise_std < float("inf"):
            raise ValueError(f"--noise-std {self.noise_std} is not a number from 0 on")

    def copied_layers(self, layers: int) -> list[int]:
        """The layers to copy of a model with so many, in order; empty if it does not become deeper.

        They are those named, or the last of each of as many equal parts as there are copies (LLaMA-Pro).

        Raises:
            ValueError: naming the option, for an impossible depth or layer.
        """
        depth, named = self.depth, self.layers
        if depth is not None and depth <= layers:
            raise ValueError(f"--depth {depth} is not more than the {layers} layers of the source")
        if depth is not None and depth > LARGEST_FACTOR * layers:
            raise ValueError(f"--depth {depth} is more than {LARGEST_FACTOR} times the {layers} layers of the source")
        if named is None:
            copies = 0 if depth is None else depth - layers
            return [-(-(copy + 1) * layers // copies) - 1 for copy in range(copies)]
        if not named or (wrong := [layer for layer in named if not 0 <= layer < layers]):
            raise ValueError(
                f"--layers {','.join(map(str, wrong)) if named else 'of none'} is not among the {layers} layers of the "
                f"source, 0 to {layers - 1}"
            )
        if depth is not None and layers + len(named) != depth:
            raise ValueError(f"--layers names {len(named)} layers, but --depth {depth} adds {depth - layers}")
        return sorted(named)

    def neurons(self, old: int) -> int:
        """The number of neurons of an MLP of `old` neurons after growth.

        Raises:
            ValueError: for a factor that gives no larger whole number.
        """
        times = self.mlp
        if times is None:
            return old
        if not 1 < times < float("inf"):
            raise ValueError(f"--mlp {times:g} is not more than 1")
        if times > LARGEST_FACTOR:
            raise ValueError(f"--mlp {times:g} is more than {LARGEST_FACTOR}")
        if abs(times * old - round(times * old)) > 1e-6:
            raise ValueError(f"--mlp {times:g} times the {old} neurons of the source is not a whole number")
        return round(times * old)


def _factor(option: str, times: int | float | None) -> int | None:
    if times is not None and times > LARGEST_FACTOR:
        raise ValueError(f"{option} {times:g} is more than {LARGEST_FACTOR}; grow in steps if that is what you mean")
    if times is not None and not (times >= 2 and times == times // 1):
        raise ValueError(f"{option} {times:g} is not a whole number from 2 on, as a number of replicas must be")
    return None if times is None else int(times)


def _layers(layers: str | list[int] | None) -> list[int] | None:
    if not isinstance(layers, str):
        return layers
    try:
        return [int(layer) for layer in layers.split(",")]
    except ValueError:
        raise ValueError(f"--layers {layers} is not a list of layers such as 3,7,11") from None
