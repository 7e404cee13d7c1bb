"""Changed inputs of every kind, each to be used or refused in one line: `python -m benchmarks.fuzz`."""
