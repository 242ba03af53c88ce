"""Model families that can be converted."""
