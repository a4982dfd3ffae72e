"""The greedy token of a decode step, and the bookkeeping that follows from it."""
