"""Growth operators."""
