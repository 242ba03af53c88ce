"""Checkpoints in and out: sources, streams, expansion, verification."""
