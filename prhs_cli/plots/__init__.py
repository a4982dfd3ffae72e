"""Figures, one per file, drawn from saved result files and bundles: `draw(result, path)`."""
