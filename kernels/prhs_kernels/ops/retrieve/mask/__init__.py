"""Bit masks of a row's positions."""
