"""The working files of a split: large tensors on disk, and the state that an interrupted run resumes from."""

import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from gda.common.errors import errors_naming
from gda.common.files import read_json, remove, write_json
from gda.conversion.tensors.safetensors_io import TensorSpec, file_order, write_safetensors

FINGERPRINT_FILE = "begun.json"


class Work:
    """A folder of tensors that survives a killed process.

    `allocate` maps a file into memory. `save` writes tensors and facts atomically. `fingerprint` is what the work
    depends on; ValueError if the folder holds work with another one. `is_new`: whether the folder held none.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any]):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        begun = folder / FINGERPRINT_FILE
        self.is_new = not begun.exists()
        if self.is_new:
            write_json(begun, fingerprint)
        elif read_json(begun) != fingerprint:
            raise ValueError(
                f"{folder.parent} was started with another source, text or setting; "
                "pass --overwrite instead of --resume to start over"
            )

    def allocate(self, name: str, *shape: int) -> torch.Tensor:
        """A float32 tensor in a mapped file: zeros at first, later what it last held; OSError if the disk is full."""
        path, size = self.folder / f"{name}.bin", math.prod(shape)
        _reserve(path, size * torch.float32.itemsize)
        return torch.from_file(str(path), shared=True, size=size, dtype=torch.float32).view(shape)

    def has(self, name: str) -> bool:
        """Whether facts are saved under this name."""
        return (self.folder / f"{name}.json").exists()

    def save(self, name: str, facts: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> None:
        """Save tensors, and then facts. `has` is true once the facts are saved."""
        if tensors is not None:
            specs = {each: TensorSpec(tuple(tensor.shape), tensor.dtype) for each, tensor in tensors.items()}
            in_order = ((each, tensors[each].cpu()) for each in file_order(specs))
            write_safetensors(self.folder / f"{name}.safetensors", specs, in_order)
        write_json(self.folder / f"{name}.json", facts)

    def facts(self, name: str) -> dict[str, Any]:
        """The facts saved under this name."""
        facts: dict[str, Any] = read_json(self.folder / f"{name}.json")
        return facts

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors saved under this name."""
        return load_file(self.folder / f"{name}.safetensors")

    def forget(self, name: str) -> None:
        """Remove the facts saved under this name, then the tensors."""
        for suffix in (".json", ".safetensors"):
            remove(self.folder / f"{name}{suffix}")


def _reserve(path: Path, nbytes: int) -> None:
    """Allocate all blocks of the file: writing to a mapped file on a full disk would kill the process."""
    path.touch()
    # Not for appending: where a file system cannot reserve blocks, glibc reads and writes each of them.
    with open(path, "r+b") as file, errors_naming(path):
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(file.fileno(), 0, nbytes)
