"""Helpers that every room uses. They import no room."""
