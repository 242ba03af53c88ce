"""The model families that can be converted, and how their configurations and tensors are translated."""
