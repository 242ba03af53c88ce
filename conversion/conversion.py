"""A planned conversion: what a mode makes of a source, before a tensor is read."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from gda.common.trainable import Trainable
from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.split.report import SplitReport
from gda.conversion.tensors.new_parameters import describe_new
from gda.conversion.tensors.recipes import Recipe, checkpoint_specs


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a mode makes of a source. Writing, verification and the model card need nothing else.

    Attributes:
        mode: Name of the mode, as in `modes.registry.MODES`.
        config: Configuration of the result.
        recipes: How each tensor of the result is made, in the order in which transformers saves them.
        lossless: Whether the result must compute what the source computes.
        notes: What the user should know: what is lost, assumed or left out.
        settings: What the mode itself adds to the settings in conversion.json.
        kept: By kind of feature (`tensors.axes`), which features of the result come from the source, as booleans. All
            features of an absent kind do.
        new: Patterns of the names of parameters that are new as a whole.
        before: The conversion that low-rank factorization or growth started from; None for other modes.
        work: Makes the conversion final in a folder that lasts until the tensors are written, for a mode that has to
            fit something first. Until then the recipes only say which tensors there will be.
        work_bytes: What that work needs in the folder.
        split: The report of that work.
        save_config: Writes the configuration into a folder; None for a GDA model, whose code is saved with it.
    """

    mode: str
    config: Any  # GDAConfig, or after an export transformers' class of the other type
    recipes: dict[str, Recipe]
    lossless: bool
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    new: tuple[str, ...] = ()
    before: "Conversion | None" = None
    work: "Callable[[Path, Console | None], Conversion] | None" = None
    work_bytes: int = 0
    split: SplitReport | None = None
    save_config: Callable[[Path], object] | None = None

    @property
    def new_parameters(self) -> Trainable | None:
        """The content of trainable.json; None if all parameters are the source's."""
        if not self.kept and not self.new:
            return None
        return describe_new(self.config, self.recipes, kept=self.kept, new=self.new)

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the result."""
        return sum(recipe.spec.numel for recipe in self.recipes.values())

    @property
    def nbytes(self) -> int:
        """Size of the result's tensors in bytes."""
        return sum(recipe.spec.nbytes for recipe in self.recipes.values())

    def in_order(self) -> "Conversion":
        """The same conversion with its recipes in the order in which transformers saves their tensors."""
        specs = checkpoint_specs(self.config)
        assert {name: spec.shape for name, spec in specs.items()} == {
            name: recipe.spec.shape for name, recipe in self.recipes.items()
        }
        return replace(self, recipes={name: self.recipes[name] for name in specs})


def with_fields(config: GDAConfig, **changes: Any) -> GDAConfig:
    """A copy of the configuration with these fields changed; ValueError for an impossible one."""
    changed = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(changed, name, value)
    changed.validate_architecture()
    return changed
