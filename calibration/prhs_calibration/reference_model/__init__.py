"""The embedded models: weights, tokenizer, held-out text, and what trains it again."""

from importlib.resources import files
from pathlib import Path

__all__ = ["reference_path"]


def reference_path(folder: str = "weights") -> Path:
    """Folder of an embedded checkpoint (config, bf16 safetensors, tokenizer), loadable by transformers.

    The package is always installed unpacked (package data, no zip import), so the resource is a real folder.
    """
    return Path(str(files(__name__).joinpath(folder)))
