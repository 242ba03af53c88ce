"""A training run: its processes, its folder and its checkpoints."""
