"""The index set of a row from the importance of its positions."""
