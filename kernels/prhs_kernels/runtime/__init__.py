"""Hooks into transformers: cache, attention function, scoring passes and the decode loop."""
