"""Where a conversion reads from: a folder, the Hub, or a GGUF file."""
