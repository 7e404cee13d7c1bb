"""expe-edge: small language models with ExPE positions, from PyTorch training to int8 ONNX packages."""

__version__ = "0.1.0"
