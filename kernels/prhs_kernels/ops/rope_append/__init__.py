"""Rotary embedding of one decode step, the new key and value written into the cache."""
