"""Collect and tokenise training text: `python -m prhs_calibration.reference_model.prepare --out FOLDER`.

Text is this Python's standard library and those installed packages that are under permissive licences. Files
that share lines with the held-out text are left out, as are files that mostly repeat earlier ones.
"""

import argparse
import hashlib
import json
import re
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

from ..evaluation.tasks import episodes
from ..evaluation.tasks.types import Episode, text_of
from . import data
from .recall import draw_facts
from .tokenizer import load_tokenizer, save_tokenizer, tokenize, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# import name -> (distribution, licence)
PACKAGES = {
    "torch": ("torch", "BSD-3-Clause and Apache-2.0"),
    "torchgen": ("torch", "BSD-3-Clause and Apache-2.0"),
    "transformers": ("transformers", "Apache-2.0"),
    "sympy": ("sympy", "BSD-3-Clause"),
    "scipy": ("scipy", "BSD-3-Clause"),
    "numpy": ("numpy", "BSD-3-Clause"),
    "networkx": ("networkx", "BSD-3-Clause"),
    "matplotlib": ("matplotlib", "matplotlib licence (PSF style)"),
    "mypy": ("mypy", "MIT"),
    "setuptools": ("setuptools", "MIT"),
    "fontTools": ("fonttools", "MIT"),
    "pygments": ("pygments", "BSD-2-Clause"),
    "pydantic": ("pydantic", "MIT"),
    "huggingface_hub": ("huggingface-hub", "Apache-2.0"),
    "rich": ("rich", "MIT"),
    "triton": ("triton", "MIT"),
    "PIL": ("pillow", "MIT-CMU"),
    "accelerate": ("accelerate", "Apache-2.0"),
    "typer": ("typer", "MIT"),
    "click": ("click", "BSD-3-Clause"),
    "jinja2": ("jinja2", "BSD-3-Clause"),
    "tokenizers": ("tokenizers", "Apache-2.0"),
    "mpmath": ("mpmath", "BSD-3-Clause"),
    "_pytest": ("pytest", "MIT"),
    "anyio": ("anyio", "MIT"),
    "psutil": ("psutil", "BSD-3-Clause"),
    "fsspec": ("fsspec", "BSD-3-Clause"),
    "pyparsing": ("pyparsing", "MIT"),
    "packaging": ("packaging", "Apache-2.0 or BSD-2-Clause"),
    "safetensors": ("safetensors", "Apache-2.0"),
}
VOCAB_SIZE = 4096
_SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt")
_SKIPPED = {"_vendor", "vendor", "typeshed", "third_party", "_distutils", "__pycache__", "idle_test"}
_OTHER_LICENCE = re.compile(
    r"\bGPL|General Public License|Mozilla Public|\bLGPL|Creative Commons|CC-BY|proprietary"
    r"|NVIDIA CORPORATION",
    re.IGNORECASE,
)
_LONG_LINE = 30  # characters of a line that counts when files are compared
_MOST_HELD_OUT, _MOST_REPEATED = 0.1, 0.6  # of a file's long lines


def collect(site: Path | None = None) -> dict[str, str]:
    """Name -> text, the standard library's files ("python/...") first; names start with the import name."""
    held_out = {line for text in data.held_out_files().values() for line in _long_lines(text)}
    candidates = [(f"python/{name}", text) for name, text in data.training_files().items()]
    candidates += _package_files(site or Path(sysconfig.get_path("purelib")))
    seen: set[str] = set()
    kept: dict[str, str] = {}
    for name, raw in candidates:
        text = raw.replace("\r\n", "\n").expandtabs(4)
        own = name.startswith("python/")
        if not data.is_prose_or_code(text) or (not own and _OTHER_LICENCE.search(text[:4000])):
            continue
        lines = _long_lines(text)
        if lines and not own and sum(line in held_out for line in lines) > _MOST_HELD_OUT * len(lines):
            continue
        if lines and sum(line in seen for line in lines) > _MOST_REPEATED * len(lines):
            continue
        seen.update(lines)
        kept[name] = text
    return kept


def make_tokenizer(texts: dict[str, str], max_length: int) -> "PreTrainedTokenizerFast":
    """Byte-level BPE of modules, of a sample of the packages' text and of lines of the tasks (seen forms)."""
    rng = Random(0)
    modules = [text for name, text in texts.items() if name.startswith("python/") and "test/" not in name]
    others = [text for name, text in texts.items() if not name.startswith("python/")]
    rng.shuffle(others)
    sample, size = [], 0
    for text in others:
        if size > 12_000_000:
            break
        sample.append(text)
        size += len(text)
    return train_tokenizer([*modules, *sample, *_task_lines(rng)], max_length, VOCAB_SIZE)


def sample(texts: dict[str, str], characters: int) -> dict[str, str]:
    """Files in a random order until they hold `characters`; a fine-tune needs less text than a whole run."""
    order = sorted(texts)
    Random(1).shuffle(order)
    kept: dict[str, str] = {}
    size = 0
    for name in order:
        if size >= characters:
            break
        kept[name] = texts[name]
        size += len(texts[name])
    return kept


def manifest(texts: dict[str, str]) -> dict[str, Any]:
    """Per source: version, licence, files, characters and a hash of names and texts."""
    found: dict[str, Any] = {}
    for name in sorted({name.split("/")[0] for name in texts}):
        own = {key: text for key, text in sorted(texts.items()) if key.split("/")[0] == name}
        digest = hashlib.sha256("".join(f"{key}\0{text}\0" for key, text in own.items()).encode())
        row = {"files": len(own), "characters": sum(map(len, own.values())), "sha256": digest.hexdigest()}
        distribution, licence = PACKAGES.get(name, ("", "PSF-2.0"))
        try:
            row |= {"version": version(distribution) if distribution else sysconfig.get_python_version()}
        except PackageNotFoundError:
            pass
        found[name] = {**row, "licence": licence}
    return found


def main(argv: list[str] | None = None) -> None:
    """Write tokenizer, `tokens.u16.xz` and `manifest.json`; prints how many tokens come from the library."""
    parser = argparse.ArgumentParser(
        prog="python -m prhs_calibration.reference_model.prepare", description=__doc__
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--context-length", type=int, default=8192)
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer to use instead of a new one")
    parser.add_argument("--characters", type=int, help="of whole files, about this much, drawn at random")
    options = parser.parse_args(argv)
    texts = collect()
    if options.tokenizer:
        tokenizer = load_tokenizer(options.tokenizer)
    else:
        tokenizer = make_tokenizer(texts, options.context_length)
    save_tokenizer(tokenizer, options.out)
    if options.characters:
        texts = sample(texts, options.characters)
    own = {name: text for name, text in sorted(texts.items()) if name.startswith("python/")}
    others = [(name, text) for name, text in sorted(texts.items()) if not name.startswith("python/")]
    Random(0).shuffle(others)
    front = tokenize(tokenizer, own)
    tokens = np.concatenate((front, tokenize(tokenizer, dict(others))))
    (options.out / "tokens.u16.xz").write_bytes(data.pack_tokens(tokens))
    facts = {
        "sources": manifest(texts),
        "tokens": len(tokens),
        "tokens_of_the_standard_library": len(front),
        "sha256_of_tokens": hashlib.sha256(tokens.astype("<u2").tobytes()).hexdigest(),
    }
    (options.out / "manifest.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{len(tokens)} tokens; pass --favoured {len(front)} to the training script")


def _package_files(site: Path) -> list[tuple[str, str]]:
    found = []
    for package in PACKAGES:
        for path in sorted((site / package).rglob("*")):
            if path.suffix not in _SUFFIXES or not path.is_file() or _SKIPPED & set(path.parts):
                continue
            if not 400 <= path.stat().st_size <= 900_000:
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            plain = "".join(letter for letter in text if letter <= "\x7f")
            if len(plain) >= 0.99 * len(text):
                found.append((f"{package}/{path.relative_to(site / package).as_posix()}", plain))
    return found


def _long_lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.split("\n")) if len(line) >= _LONG_LINE]


def _task_lines(rng: Random) -> list[str]:
    """Lines of the tasks' seen forms, so that their names and words become short in tokens."""
    drawn: list[Episode] = []
    lines = []
    for index in range(2500):
        drawn.append(episodes.facts(rng, "seen", count=1, asked=1))
        if index % 3 == 0:
            drawn.append(episodes.chains(rng, "seen", count=1, asked=1))
            drawn.append(episodes.paragraphs(rng, "seen", count=1, asked=1))
            drawn.append(episodes.pairs(rng, "seen", count=3, asked=1))
        if index % 6 == 0:
            drawn.append(episodes.passages(rng, "seen", count=1, asked=1, words=6))
            drawn.append(episodes.listed(rng, "seen", count=1, asked=1))
        if index < 1000:
            fact = draw_facts(rng, 1)[0]
            lines.append(f"{fact.sentence}\n{fact.question}{fact.answer}\n")
    for episode in drawn:
        lines += [text_of(line) + "\n" for block in episode.blocks for line in block]
        lines += [text_of(asked.prompt) + text_of(asked.answer) + "\n" for asked in episode.questions]
    return lines


if __name__ == "__main__":
    main()
