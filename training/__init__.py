"""Training GDA models: what the Trainer of transformers is given."""

from .anneal import LambdaAnnealCallback
from .growth import GrowthMaskCallback

__all__ = ["GrowthMaskCallback", "LambdaAnnealCallback"]
