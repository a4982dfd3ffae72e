"""Offline half of PrHS: a model and prompts in, a bundle with a measured error promise out."""

__version__ = "0.1.0"  # as in pyproject.toml; known here also where nothing is installed
