"""Rows of different length shared out to programs, and the merge of their parts: used by several kernels."""
