"""A study: encodings × seeds × ablations, trained, scored by length, and gathered into one report."""
