"""The device that models run on."""

import torch


def choose_device(device: str | None) -> str:
    """`device`, which must exist (lm-eval would use another one). None: a GPU if there is one, else the CPU."""
    available = ["cpu"]
    if torch.cuda.is_available():
        available = ["cuda", "cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        available.append("mps")
    if device is None:
        return available[0]
    if device not in available:
        raise ValueError(f"--device {device} does not exist; available devices: {', '.join(available)}")
    return device
