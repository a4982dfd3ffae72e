"""Merge attention states (output, log-sum-exp) of disjoint sets of keys."""
