"""Selection and sparse attention: parameters, operators, selectors and the decode runtime."""
