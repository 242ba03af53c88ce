"""Conversion modes: how each output tensor is computed."""
