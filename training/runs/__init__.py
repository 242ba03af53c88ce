"""The folder, processes and checkpoints of a training run."""
