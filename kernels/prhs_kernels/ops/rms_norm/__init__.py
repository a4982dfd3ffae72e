"""Root-mean-square norm of the residual stream, the addition before it included."""
