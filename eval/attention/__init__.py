"""Attention maps: analysis, report and diagnostics."""
