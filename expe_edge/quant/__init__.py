"""Rounding of weights: what is asked for, and the arithmetic. Imports neither onnx nor onnxruntime."""
