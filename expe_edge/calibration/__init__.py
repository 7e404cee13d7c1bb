"""What text shows of a model: ranges, moments, the divergence that each format costs."""
