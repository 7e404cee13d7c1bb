"""Positions as integer codes, and the settings of every positional encoding. Imports neither torch nor onnx."""
