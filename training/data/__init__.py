"""Training text and the token sequences made of it."""
