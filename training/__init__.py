"""Training GDA models: what the Trainer of transformers is given."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .anneal import LambdaAnnealCallback
from .growth import GrowthMaskCallback

if TYPE_CHECKING:
    from .distillation import Distillation
    from .layer_log import LayerLog
    from .parameters import choose_what_learns, merged, optimizer_groups
    from .trainer import GDATrainer

__all__ = [
    "Distillation",
    "GDATrainer",
    "GrowthMaskCallback",
    "LambdaAnnealCallback",
    "LayerLog",
    "accelerate_config",
    "choose_what_learns",
    "merged",
    "optimizer_groups",
]

# Where the names are that take the modelling code and the Trainer along.
_HOMES = {
    "Distillation": "distillation",
    "GDATrainer": "trainer",
    "LayerLog": "layer_log",
    "choose_what_learns": "parameters",
    "merged": "parameters",
    "optimizer_groups": "parameters",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gda.training' has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


def accelerate_config(name: str) -> Path:
    """The path of a configuration for `accelerate launch --config_file`, which spreads a model over processes.

    Args:
        name: `fsdp2`, PyTorch's fully sharded data parallelism; or `zero3`, DeepSpeed's.

    Raises:
        ValueError: for another name.
    """
    folder = Path(__file__).parent / "configs"
    if name not in (known := sorted(path.stem for path in folder.glob("*.yaml"))):
        raise ValueError(f"there is no accelerate configuration {name!r}, but {' and '.join(known)}")
    return folder / f"{name}.yaml"
