"""Our runtime beside others on models of one shape, in one run."""
