"""One tile of attention and the state of a split: used by several kernels."""
