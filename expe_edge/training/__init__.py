"""Model to checkpoint: settings, the run, resuming, rounding while training."""
