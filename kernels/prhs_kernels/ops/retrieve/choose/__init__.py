"""The index set of a row from its scores."""
