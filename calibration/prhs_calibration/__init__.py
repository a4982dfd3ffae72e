"""Offline half of PrHS: a model and prompts in, a bundle with a measured error promise out."""
