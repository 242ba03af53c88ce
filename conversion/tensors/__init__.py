"""Tensors of checkpoints: how they are read, made and written."""
