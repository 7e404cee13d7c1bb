"""The ONNX graph: weights to nodes, whatever their format, and running what was built."""
