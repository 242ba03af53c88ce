"""Training GDA models with the Trainer of transformers. Names are imported when they are first used."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gda.training.callbacks.fading import FadeCallback
    from gda.training.callbacks.layer_log import LayerLog
    from gda.training.distillation import Distillation
    from gda.training.lora import merged
    from gda.training.parameters import choose_what_learns, optimizer_groups
    from gda.training.settings import TrainSettings
    from gda.training.trainer import GDATrainer

_HOMES = {
    "Distillation": "distillation",
    "FadeCallback": "callbacks.fading",
    "GDATrainer": "trainer",
    "LayerLog": "callbacks.layer_log",
    "TrainSettings": "settings",
    "choose_what_learns": "parameters",
    "merged": "lora",
    "optimizer_groups": "parameters",
}

__all__ = [
    "Distillation",
    "FadeCallback",
    "GDATrainer",
    "LayerLog",
    "TrainSettings",
    "accelerate_config",
    "choose_what_learns",
    "merged",
    "optimizer_groups",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gda.training' has no attribute {name!r}")
    return getattr(import_module(f"gda.training.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


def accelerate_config(name: str) -> Path:
    """The path of a configuration for `accelerate launch --config_file` that shards a model over processes.

    Args:
        name: `fsdp2`, PyTorch's fully sharded data parallelism; or `zero3`, DeepSpeed's.

    Raises:
        ValueError: for another name.
    """
    folder = Path(__file__).parent / "configs"
    if name not in (known := sorted(path.stem for path in folder.glob("*.yaml"))):
        raise ValueError(f"unknown accelerate configuration {name!r}; available: {', '.join(known)}")
    return folder / f"{name}.yaml"
