"""Writing low-bit key copies."""
