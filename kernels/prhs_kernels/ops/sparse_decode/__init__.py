"""Attention of decode queries over the kept positions only."""
