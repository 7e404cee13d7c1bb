"""Checkpoint to graph to package. `exporter.export` is the way in."""
