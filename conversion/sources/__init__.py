"""Where models are read from: a folder, the Hub, or a GGUF file."""
