"""Attention of decode queries over everything they may see: the fallback, and the rival to beat."""
