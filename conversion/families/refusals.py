"""What another system cannot compute is refused, by the field or the layer that says it."""

import math
from typing import Any

from gda.configuration.configuration_gda import GDAConfig


def require_fields(config: GDAConfig, target: str, wanted: dict[str, Any]) -> None:
    """Raise ValueError naming the first field of `config` that has not the one value that `target` can compute."""
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ValueError(f"{name}={getattr(config, name)!r} has no counterpart in {target}")


def require_schedule(config: GDAConfig, target: str, offset: int) -> None:
    """Raise ValueError naming the first layer whose λ_init is not 0.8 − 0.6 · exp(−0.3 · (layer + `offset`))."""
    for layer in range(config.num_hidden_layers):
        scheduled = 0.8 - 0.6 * math.exp(-0.3 * (layer + offset))
        if not math.isclose(config.layer_lambda_init(layer), scheduled, rel_tol=1e-12, abs_tol=1e-12):
            raise ValueError(
                f"λ_init of layer {layer} is {config.layer_lambda_init(layer):.6g}, but the code of {target} "
                f"computes {scheduled:.6g} there (lambda_init_offset {offset})"
            )
