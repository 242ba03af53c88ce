"""Stands in for transformers' generation tests, which its sdist lacks; `run.py` uses theirs where it finds them."""


class GenerationTesterMixin:
    """No tests."""

    is_stand_in = True
