"""Labels, as everywhere in transformers."""

from torch import Tensor

NO_LABEL = -100  # a token that is not predicted


def num_predicted(labels: Tensor) -> Tensor:
    """How many of the labels (B, T) are predicted: a causal model shifts them, so the first ones are not."""
    return labels[:, 1:].ne(NO_LABEL).sum()
