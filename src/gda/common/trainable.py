"""trainable.json: which parameters of a converted or grown model are new. Conversion writes it, training reads it."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gda.common.files import read_json, write_json

TRAINABLE_FILE = "trainable.json"
# Comma-separated slices, or the whole axis.
SLICES = re.compile(r":|\d+:\d+(,\d+:\d+)*")


@dataclass(frozen=True)
class NewParameters:
    """Parameters that are new, wholly or in part.

    Attributes:
        pattern: A regular expression that matches their whole names, as `named_parameters` returns them.
        kept: The part that is not new, as slices of each axis: ["0:16,24:40", ":"] are all columns of these rows. None
            if everything is new.
    """

    pattern: str
    kept: list[str] | None


@dataclass(frozen=True)
class Trainable:
    """The content of trainable.json.

    Attributes:
        parameters: What is new. The first pattern that matches a name counts; other parameters are not new.
        peft: Arguments of PEFT's `LoraConfig`: `target_modules`, the linear layers with new parameters, and
            `modules_to_save`, other modules with new parameters. λ vectors, which are no module, and tied embeddings
            are absent.
    """

    parameters: list[NewParameters]
    peft: dict[str, Any]

    @classmethod
    def read(cls, folder: str | Path) -> "Trainable":
        """Read `folder`/trainable.json.

        Raises:
            FileNotFoundError, ValueError: naming the file, if it is missing or malformed.
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
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError, re.error):
            raise ValueError(f"{path} does not name the new parameters of a model; grow or convert it again") from None

    def to_dict(self) -> dict[str, Any]:
        """The content as JSON-ready values."""
        return {"parameters": [vars(each) for each in self.parameters], "peft": self.peft}

    def write(self, folder: Path) -> None:
        """Write `folder`/trainable.json, atomically."""
        write_json(folder / TRAINABLE_FILE, self.to_dict())

    def _find(self, name: str) -> NewParameters | None:
        return next((each for each in self.parameters if re.fullmatch(each.pattern, name)), None)

    def holds(self, name: str) -> bool:
        """Whether the parameter `name` is new, wholly or in part."""
        return self._find(name) is not None

    def new_entries(self, name: str, parameter: Tensor) -> Tensor | None:
        """Which entries of the parameter `name` are new, as booleans of its shape; None if none is.

        Raises:
            ValueError: if the parameter has another number of axes than trainable.json says.
        """
        found = self._find(name)
        if found is None:
            return None
        if found.kept is None:
            return torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device)
        if len(found.kept) != parameter.dim():
            raise ValueError(f"{name} has {parameter.dim()} axes, but {TRAINABLE_FILE} describes {len(found.kept)}")
        old = torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device)
        for axis, kept in enumerate(found.kept):
            if kept != ":":
                here = torch.zeros(parameter.shape[axis], dtype=torch.bool, device=parameter.device)
                for piece in kept.split(","):
                    here[slice(*map(int, piece.split(":")))] = True
                old &= here.view([-1 if each == axis else 1 for each in range(parameter.dim())])
        return ~old

    def freeze_others(self, model: nn.Module) -> list[str]:
        """Freeze what is not new in a model with the names of the grown checkpoint; return the names that are trained.

        The gradient of the old part of a partly new parameter is kept at zero. Its attribute `new_entries` says which
        entries are new; give it no weight decay, which moves weights without a gradient.

        Raises:
            ValueError: if no parameter of the model is new.
        """
        trained = []
        for name, parameter in model.named_parameters():
            new = self.new_entries(name, parameter)
            parameter.requires_grad_(new is not None)
            if new is None:
                continue
            trained.append(name)
            if not bool(new.all()):
                parameter.register_hook(_masking(new))
                parameter.new_entries = new  # type: ignore[attr-defined]
        if not trained:
            raise ValueError(f"no parameter of the model is named in {TRAINABLE_FILE}; is it the model's?")
        return trained


def _masking(new: Tensor) -> Callable[[Tensor], Tensor]:
    """A hook that keeps a gradient where `new` is set. The model may move to another device before it is trained."""

    def masked(gradient: Tensor) -> Tensor:
        nonlocal new
        new = new.to(gradient.device)
        return gradient * new

    return masked


def slices(flags: list[bool]) -> str:
    """The slices in which `flags` are set, as in `NewParameters.kept`."""
    edges = [i for i in range(len(flags) + 1) if (i > 0 and flags[i - 1]) != (i < len(flags) and flags[i])]
    return ":" if all(flags) else ",".join(f"{a}:{b}" for a, b in zip(edges[::2], edges[1::2], strict=True))
