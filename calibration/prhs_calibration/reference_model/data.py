"""Text of the embedded model: the Python standard library, split by file into training and held-out text.

Held-out text is shipped (`held_out.txt.xz`), so that calibration prompts do not depend on the user's Python;
training text is read from the standard library of the Python that trains, minus every shipped file name.
"""

import hashlib
import lzma
import re
import sysconfig
from importlib.resources import files
from pathlib import Path

import numpy as np
import numpy.typing as npt

HELD_OUT_FILE = "held_out.txt.xz"
HELD_OUT_CHARS = 3_400_000
_RECORD = "\x1e"  # starts the header line of each file in an archive; the files are checked not to contain it
_NOTICE = re.compile(r"copyright|licen[cs]e|all rights reserved", re.IGNORECASE)
_SKIPPED_FOLDERS = {"site-packages", "encodings", "__pycache__", "lib2to3", "bad_coding", "turtledemo"}
_MAX_FILE_CHARS = 900_000


def stdlib_files(root: Path | None = None) -> dict[str, str]:
    """Path inside the library -> text of its readable ASCII sources, sorted by path.

    Folders with byte tables or broken-on-purpose sources are left out, as are files that are mostly data.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    found: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if _SKIPPED_FOLDERS & set(name.split("/")):
            continue
        raw = path.read_bytes()
        if not 400 <= len(raw) <= _MAX_FILE_CHARS or not raw.isascii():
            continue
        text = raw.decode("ascii").replace("\r\n", "\n").expandtabs(4)
        if is_prose_or_code(text):
            found[name] = text
    return found


def split(
    sources: dict[str, str], held_out_chars: int = HELD_OUT_CHARS
) -> tuple[dict[str, str], dict[str, str]]:
    """Split by file into (training, held-out).

    Held-out files are library modules (no tests) in the order of the hash of their path until there are
    `held_out_chars` characters of them. Modules with a licence notice of their own are never held out,
    because held-out text is redistributed: what ships is under the Python licence alone.
    """
    eligible = [name for name, text in sources.items() if not _is_test(name) and not _NOTICE.search(text)]
    eligible = [name for name in eligible if not name.startswith("pydoc_data/")]
    eligible.sort(key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    held_out: dict[str, str] = {}
    size = 0
    for name in eligible:
        if size >= held_out_chars:
            break
        held_out[name] = sources[name]
        size += len(sources[name])
    training = {name: text for name, text in sources.items() if name not in held_out}
    return training, dict(sorted(held_out.items()))


def training_files() -> dict[str, str]:
    """Training text of the running Python: every source whose path is not a shipped held-out file."""
    held_out = held_out_files()
    return {name: text for name, text in stdlib_files().items() if name not in held_out}


def held_out_files() -> dict[str, str]:
    """The shipped held-out text, path inside the library -> text."""
    resource = files("prhs_calibration.reference_model").joinpath(HELD_OUT_FILE)
    return unpack(resource.read_bytes())


def pack(sources: dict[str, str]) -> bytes:
    """One deterministic xz stream of all files, in path order."""
    records = []
    for name, text in sorted(sources.items()):
        if _RECORD in text:
            raise ValueError(f"{name} contains the record separator")
        records.append(f"{_RECORD}{name}\n{text}")
    return lzma.compress("".join(records).encode(), preset=9 | lzma.PRESET_EXTREME)


def unpack(archive: bytes) -> dict[str, str]:
    """Inverse of `pack`."""
    text = lzma.decompress(archive).decode()
    found = {}
    for record in text.split(_RECORD)[1:]:
        name, _, body = record.partition("\n")
        found[name] = body
    return found


def pack_tokens(tokens: npt.NDArray[np.uint16]) -> bytes:
    """Token ids as one xz stream of little-endian 16-bit numbers."""
    settings = {"id": lzma.FILTER_LZMA2, "preset": 4, "lc": 0, "lp": 1, "pb": 1}
    return lzma.compress(tokens.astype("<u2").tobytes(), format=lzma.FORMAT_XZ, filters=[settings])


def unpack_tokens(archive: bytes) -> npt.NDArray[np.uint16]:
    """Inverse of `pack_tokens`."""
    return np.frombuffer(lzma.decompress(archive), dtype="<u2").astype(np.uint16)


def _is_test(name: str) -> bool:
    return any(part in {"test", "tests", "idle_test"} for part in name.split("/"))


def is_prose_or_code(text: str) -> bool:
    """Long lines, or more digits and punctuation than letters, mean tables and generated data."""
    if _RECORD in text or max(map(len, text.split("\n"))) > 600:
        return False
    letters = sum(map(str.isalpha, text))
    digits = sum(map(str.isdigit, text))
    return letters > 0.4 * len(text) and digits < 0.1 * len(text)
