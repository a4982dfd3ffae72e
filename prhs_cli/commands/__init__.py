"""One verb per file: parse, call, render."""
