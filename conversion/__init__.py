"""Converting, growing, exporting, checking and pushing checkpoints."""
