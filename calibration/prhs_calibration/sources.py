"""The user's own text: files and folders of .txt, .md, .py and .jsonl."""

import json
from collections.abc import Sequence
from pathlib import Path

from prhs_kernels.errors import InputError

SUFFIXES = (".txt", ".md", ".py", ".jsonl")


def read_sources(sources: Sequence[Path]) -> str:
    """Text of all files (folders recursively), in path order. InputError names a file that cannot be used."""
    texts = [_read(path) for source in sources for path in _files(source)]
    text = "\n".join(part for part in texts if part.strip())
    if not text:
        raise InputError(
            f"{', '.join(map(str, sources))}: no text in it; give files of {', '.join(SUFFIXES)}"
        )
    return text


def _files(source: Path) -> list[Path]:
    if source.is_dir():
        return sorted(path for path in source.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    if not source.exists():
        raise InputError(f"corpus {source} does not exist; give a file or folder of {', '.join(SUFFIXES)}")
    if source.suffix not in SUFFIXES:
        raise InputError(f"corpus {source} is not one of {', '.join(SUFFIXES)}; convert it to text first")
    return [source]


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"corpus {path} cannot be read ({error.strerror}); check its permissions") from error
    except UnicodeDecodeError as error:
        raise InputError(f"corpus {path} is not UTF-8 text (byte {error.start}); convert it first") from error
    return _json_lines(path, text) if path.suffix == ".jsonl" else text


def _json_lines(path: Path, text: str) -> str:
    """The "text" field of every line."""
    parts = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            part = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f'corpus {path} line {number} is not a JSON object with a "text" field; repair it'
            ) from error
        if not isinstance(part, str):
            raise InputError(f'corpus {path} line {number}: "text" is not a string; repair it')
        parts.append(part)
    return "\n".join(parts)
