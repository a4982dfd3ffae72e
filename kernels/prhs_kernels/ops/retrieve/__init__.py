"""Score candidate keys and choose an index set."""
