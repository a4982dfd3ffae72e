"""Selectors against the oracle and against each other, at equal effective budget."""
