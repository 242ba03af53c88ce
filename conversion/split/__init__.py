"""Splitting the query heads of a Llama, Mistral or Qwen into signal and noise heads."""
