"""Keeps these tests out of `pytest tests`: they need transformers' own test modules, which `run.py` fetches."""

collect_ignore_glob = ["*"]
