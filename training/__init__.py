"""Training GDA models: what the Trainer of transformers is given."""

from pathlib import Path

from gda.training.callbacks.fading import FadeCallback
from gda.training.callbacks.layer_log import LayerLog
from gda.training.distillation import Distillation
from gda.training.parameters import choose_what_learns, merged, optimizer_groups
from gda.training.settings import TrainSettings
from gda.training.trainer import GDATrainer

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
