"""Exact thresholds of a row's best positions."""
