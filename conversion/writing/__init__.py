"""Writing the folder of a converted model."""
