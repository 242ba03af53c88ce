"""λ of each layer of a GDA checkpoint."""

from collections.abc import Callable

from torch import Tensor

from gda.configuration.configuration_gda import GDAConfig


def layer_lambdas(config: GDAConfig, read: Callable[[str], Tensor]) -> list[float | None]:
    """λ of each layer in float32, faded in as far as the config says; None where it depends on the token.

    `read` reads a tensor by its name.
    """
    return [_faded(config, _layer_lambda(config, read, layer)) for layer in range(config.num_hidden_layers)]


def _layer_lambda(config: GDAConfig, read: Callable[[str], Tensor], layer: int) -> float | None:
    attention = f"model.layers.{layer}.self_attn"
    if config.lambda_type == "reparameterized":
        q1, k1, q2, k2 = (read(f"{attention}.lambda_{name}").float() for name in ("q1", "k1", "q2", "k2"))
        value = (q1 * k1).sum(0).exp() - (q2 * k2).sum(0).exp() + config.layer_lambda_init(layer)
        return value.item()
    if read(f"{attention}.lambda_proj.weight").any():
        return None
    return 0.5 if config.lambda_type == "sigmoid" else 0.0


def _faded(config: GDAConfig, value: float | None) -> float | None:
    """What a layer subtracts with, as `GDAAttention.compute_lambda` computes it."""
    fade, target = config.fade, config.lambda_target
    if fade is None or target is None:
        return value
    if value is None:
        return 0.0 if fade == 0 else None
    return (1 - fade) * fade * target + fade * value
