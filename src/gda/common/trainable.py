"""What of a grown or converted model is new: trainable.json, which growth and conversion write and training reads.

A leaf module: it imports no room.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gda.common.files import read_json, write_json

TRAINABLE_FILE = "trainable.json"
# An axis as slices that follow one another, or all of it.
SLICES = re.compile(r":|\d+:\d+(,\d+:\d+)*")


@dataclass(frozen=True)
class NewParameters:
    """Parameters that hold something new.

    Attributes:
        pattern: A regular expression that matches their names, whole, as `named_parameters` gives them.
        kept: What of them is not new, by axis, as slices: ["0:16,24:40", ":"] are all columns of these rows. None where
            all is new.
    """

    pattern: str
    kept: list[str] | None


@dataclass(frozen=True)
class Trainable:
    """The content of trainable.json.

    Attributes:
        parameters: What is new; of several patterns that match a name, the first says it. Other parameters are old.
        peft: Arguments for PEFT's `LoraConfig`: `target_modules`, the linear layers that hold something new, and
            `modules_to_save`, other modules that do and that LoRA has no form for. Left out are λ vectors, which are no
            module, and embeddings that are tied.
    """

    parameters: list[NewParameters]
    peft: dict[str, Any]

    @classmethod
    def read(cls, folder: str | Path) -> "Trainable":
        """Read `folder`/trainable.json.

        Raises:
            FileNotFoundError, ValueError: naming the file, if it is absent or another.
        """
        path = Path(folder) / TRAINABLE_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing; `gda grow`, and `gda convert` of a Llama, write it beside a model with new parts"
            )
        held = read_json(path)
        try:
            parameters = [NewParameters(each["pattern"], each["kept"]) for each in held["parameters"]]
            for each in parameters:
                re.compile(each.pattern)
                if not all(SLICES.fullmatch(axis) for axis in each.kept or []):
                    raise ValueError
            return cls(parameters, dict(held["peft"]))
        except (KeyError, TypeError, ValueError, re.error):
            raise ValueError(f"{path} does not tell what is new in a model; grow or convert it again") from None

    def to_dict(self) -> dict[str, Any]:
        """The content as JSON-ready values."""
        return {"parameters": [vars(each) for each in self.parameters], "peft": self.peft}

    def write(self, folder: Path) -> None:
        """Write `folder`/trainable.json, atomically."""
        write_json(folder / TRAINABLE_FILE, self.to_dict())

    def holds(self, name: str) -> bool:
        """Whether the parameter `name` holds something new."""
        return any(re.fullmatch(each.pattern, name) for each in self.parameters)

    def new_entries(self, name: str, parameter: Tensor) -> Tensor | None:
        """Which entries of the parameter `name` are new, as booleans of its shape; None if none is.

        Raises:
            ValueError: if the parameter has not the axes that are told of.
        """
        found = next((each for each in self.parameters if re.fullmatch(each.pattern, name)), None)
        if found is None:
            return None
        new = torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device)
        if found.kept is None:
            return new
        if len(found.kept) != parameter.dim():
            raise ValueError(f"{name} has {parameter.dim()} axes, and {TRAINABLE_FILE} tells of {len(found.kept)}")
        old = torch.ones_like(new)
        for axis, kept in enumerate(found.kept):
            if kept != ":":
                here = torch.zeros(parameter.shape[axis], dtype=torch.bool, device=parameter.device)
                for piece in kept.split(","):
                    here[slice(*map(int, piece.split(":")))] = True
                old &= here.view([-1 if each == axis else 1 for each in range(parameter.dim())])
        return ~old

    def freeze_others(self, model: nn.Module, *, whole: bool = True) -> list[str]:
        """Let only what is new learn, by `requires_grad`; return the names of the parameters that do.

        Args:
            model: With parameters named as in the grown checkpoint.
            whole: Let parameters that are new in part learn as a whole. Otherwise the gradient of their old part is
                kept at zero by a hook; use no weight decay then, which moves weights without a gradient.

        Raises:
            ValueError: if nothing in the model is told of.
        """
        learning = []
        for name, parameter in model.named_parameters():
            new = self.new_entries(name, parameter)
            parameter.requires_grad_(new is not None)
            if new is None:
                continue
            learning.append(name)
            if not whole and not bool(new.all()):
                parameter.register_hook(_masking(new))
        if not learning:
            raise ValueError(f"no parameter of the model is named in {TRAINABLE_FILE}; is it the model's?")
        return learning


def _masking(new: Tensor) -> Callable[[Tensor], Tensor]:
    """Keeps a gradient where `new` is set, on the device that the model has been moved to meanwhile."""

    def masked(gradient: Tensor) -> Tensor:
        nonlocal new
        new = new.to(gradient.device)
        return gradient * new

    return masked


def slices(flags: list[bool]) -> str:
    """The slices in which `flags` are set, as `NewParameters.kept` has them."""
    edges = [i for i in range(len(flags) + 1) if (i > 0 and flags[i - 1]) != (i < len(flags) and flags[i])]
    return ":" if all(flags) else ",".join(f"{a}:{b}" for a, b in zip(edges[::2], edges[1::2], strict=True))
