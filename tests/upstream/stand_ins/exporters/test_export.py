"""Stands in for transformers' export tests, which its sdist lacks; `run.py` uses theirs where it finds them."""


class ExportTesterMixin:
    """No tests."""

    is_stand_in = True
