"""Training data: documents, and the sequences of token ids that they are packed into."""
