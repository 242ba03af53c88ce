"""Callbacks of transformers' Trainer for GDA models."""
