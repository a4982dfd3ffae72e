"""Operators. Each folder holds a plain PyTorch `reference`; kernels are judged against it."""
