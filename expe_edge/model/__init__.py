"""The model in PyTorch: its config, the encodings, the decoder."""
