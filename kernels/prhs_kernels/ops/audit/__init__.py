"""Dropped mass of a run while it runs: retrievals exactly, other units by an independent coin."""
