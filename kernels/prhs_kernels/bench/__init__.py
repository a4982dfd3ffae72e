"""Measurements of the kernels: what the compiler makes of them, and what a GPU does with them."""
