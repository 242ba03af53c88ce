"""Llama → GDA with the same number of heads: some of each group become noise heads, and the rest is fitted to that."""
