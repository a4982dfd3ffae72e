"""Prefill attention inside a window with sinks."""
