"""Training data: documents, and the sequences of token ids that they are packed into."""

from gda.common.extras import needed_by

with needed_by("training", "train"):
    import datasets  # noqa: F401
    import pyarrow  # noqa: F401
