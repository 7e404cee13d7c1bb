"""Packages for GPUs: what onnxruntime's CUDA provider takes of them, and how they run on one."""
