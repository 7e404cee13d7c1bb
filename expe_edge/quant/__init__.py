"""Quantization: integer position codes, linear formats (how a weight becomes graph nodes), calibration."""
