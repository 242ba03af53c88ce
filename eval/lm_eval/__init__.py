"""lm-evaluation-harness with GDA models."""

from gda.common.extras import needed_by

with needed_by("evaluation on tasks", "eval"):
    import datasets  # noqa: F401
    import lm_eval.api.registry  # noqa: F401
    import pyarrow  # noqa: F401
