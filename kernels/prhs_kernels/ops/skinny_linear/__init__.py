"""Projections of few rows: as fast as the weights can be read."""
