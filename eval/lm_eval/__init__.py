"""lm-evaluation-harness with GDA models."""
