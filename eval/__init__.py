"""Evaluation: lm-evaluation-harness with GDA models, tasks, diagnostics, reports."""
