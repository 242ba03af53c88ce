"""Measuring the subtraction in a GDA layer: λ, the signal and noise outputs, and the energy of what is subtracted."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Sums over tokens: each value is a mean multiplied by its number of tokens.
SUMS = ("tokens", "lambda", "signal", "noise", "subtracted", "difference")


@contextlib.contextmanager
def subtraction_measured(attention: Any, sums: Tensor) -> Iterator[None]:
    """Add the measurements of an attention layer inside the block to `sums`, (len(SUMS),)."""

    def measure(subtract: Any, inputs: tuple[Tensor, Tensor, Tensor], _: Tensor) -> None:
        signal, noise, lambda_ = inputs
        # Autocast would cache a copy of the projection's weight made here without a gradient, and use it later.
        with torch.no_grad(), torch.autocast(signal.device.type, enabled=False):
            difference = subtract.forward(signal.float(), noise.float(), lambda_)  # without this hook
            values = (
                torch.ones((), device=sums.device),
                lambda_.float().mean(),
                signal.float().square().mean(),
                noise.float().square().mean(),
                _energy(attention, signal.float() - difference),
                _energy(attention, difference),
            )
            sums.add_(torch.stack(values), alpha=signal.shape[0] * signal.shape[1])

    hook = attention.subtract.register_forward_hook(measure)
    try:
        yield
    finally:
        hook.remove()


def measurements(sums: list[float]) -> dict[str, float]:
    """Mean λ, root mean square of the signal and noise outputs, and the subtracted share.

    That share is |W (λ o_noise)|² / |W (o_signal − λ o_noise)|², where W is the output projection.
    """
    total = dict(zip(SUMS, sums, strict=True))
    tokens = max(total["tokens"], 1.0)
    return {
        "lambda": total["lambda"] / tokens,
        "signal_norm": math.sqrt(total["signal"] / tokens),
        "noise_norm": math.sqrt(total["noise"] / tokens),
        "subtracted": total["subtracted"] / max(total["difference"], math.ulp(0)),
    }


def _energy(attention: Any, heads: Tensor) -> Tensor:
    """Mean square of the output projection of heads (B, T, C, S/C, width), without its bias."""
    if attention.num_masked_heads:
        heads = attention.mask_new_heads(heads)
    project = attention.o_proj
    heads = heads.flatten(2)
    if project.weight.is_floating_point():  # quantized weights know which dtype they want
        heads = heads.to(project.weight.dtype)
    return (project(heads) - project(torch.zeros_like(heads[:1, :1]))).float().square().mean()
