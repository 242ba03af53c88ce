"""The files of a split that is under way: what memory need not hold, and what a killed run goes on from."""

import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from gda.common.files import read_json, remove, write_json
from gda.conversion.tensors.safetensors_io import TensorSpec, file_order, write_safetensors

FINGERPRINT_FILE = "begun.json"


class Work:
    """A folder of tensors.

    Those of `allocate` are memory that the system may write to disk; after a kill their contents are what they were.
    Those of `save` appear whole or not at all.

    Args:
        folder: Made if it is not there.
        fingerprint: What the work depends on: source, text and settings.

    Raises:
        ValueError: if the folder holds the work of another fingerprint.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any]):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        begun = folder / FINGERPRINT_FILE
        if not begun.exists():
            write_json(begun, fingerprint)
        elif read_json(begun) != fingerprint:
            raise ValueError(
                f"{folder.parent} was begun with another source, text or setting; "
                "run again without --resume to start afresh"
            )

    def allocate(self, name: str, *shape: int) -> torch.Tensor:
        """Float32 memory of that shape, the same after a kill; zeros at first.

        Raises:
            OSError: naming the file, if there is no room for it.
        """
        path, size = self.folder / f"{name}.bin", math.prod(shape)
        _reserve(path, size * torch.float32.itemsize)
        return torch.from_file(str(path), shared=True, size=size, dtype=torch.float32).view(shape)

    def has(self, name: str) -> bool:
        """Whether something is saved under that name."""
        return (self.folder / f"{name}.json").exists()

    def save(self, name: str, facts: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> None:
        """Save tensors, and then the facts, by which they count as saved."""
        if tensors is not None:
            specs = {each: TensorSpec(tuple(tensor.shape), tensor.dtype) for each, tensor in tensors.items()}
            in_order = ((each, tensors[each].cpu()) for each in file_order(specs))
            write_safetensors(self.folder / f"{name}.safetensors", specs, in_order)
        write_json(self.folder / f"{name}.json", facts)

    def facts(self, name: str) -> dict[str, Any]:
        """The facts saved under that name."""
        facts: dict[str, Any] = read_json(self.folder / f"{name}.json")
        return facts

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors saved under that name."""
        return load_file(self.folder / f"{name}.safetensors")

    def forget(self, name: str) -> None:
        """Remove what is saved under that name, the facts first."""
        for suffix in (".json", ".safetensors"):
            remove(self.folder / f"{name}{suffix}")


def _reserve(path: Path, nbytes: int) -> None:
    """Make the file that large, with all its blocks: a mapped file without them kills who writes to a full disk."""
    with open(path, "ab") as file:
        try:
            if hasattr(os, "posix_fallocate"):  # macOS has none
                os.posix_fallocate(file.fileno(), 0, nbytes)
        except OSError as error:
            error.filename = str(path)
            raise
