"""Training GDA models: what the Trainer of transformers is given."""

from .growth import GrowthMaskCallback

__all__ = ["GrowthMaskCallback"]
