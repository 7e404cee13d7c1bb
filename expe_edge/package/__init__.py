"""The exported package, all that `export/` and `runtime/` share: contract, manifest, directory. No torch, no onnx."""
