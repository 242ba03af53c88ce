"""Excludes this folder from `pytest tests`: its tests need transformers' own test modules, which `run.py` downloads."""

collect_ignore_glob = ["*"]
