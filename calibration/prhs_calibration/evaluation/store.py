"""What an interrupted evaluation keeps: one JSON file per set of conditions, replaced whole."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prhs_calibration import results
from prhs_calibration.files import atomic_write

INTERVAL = 5.0  # seconds between two writes; what a kill may cost


class Store:
    """Finished pieces by name. `put` keeps one, `saving` writes them while work goes on and at its end.

    Pieces are plain JSON. A file of other conditions, or a damaged one, counts as none.
    """

    def __init__(self, path: Path, conditions: Mapping[str, Any]) -> None:
        self.path = path
        self._conditions = json.loads(results.to_json(conditions))
        self._pieces: dict[str, Any] = _read(path, self._conditions)
        self._saved = len(self._pieces)
        self._written = time.monotonic()

    @classmethod
    def for_conditions(cls, conditions: Mapping[str, Any]) -> Store:
        """The store of a run under these conditions, in this user's results folder."""
        digest = hashlib.sha256(results.to_json(conditions).encode()).hexdigest()[:16]
        return cls(results.results_dir() / "partial" / f"evaluate-{digest}.json", conditions)

    def __len__(self) -> int:
        return len(self._pieces)

    def get(self, name: str) -> Any | None:
        """The piece, or None if it is still to be done."""
        return self._pieces.get(name)

    def count(self, prefix: str) -> int:
        """Number of pieces whose name begins so."""
        return sum(name.startswith(prefix) for name in self._pieces)

    def put(self, name: str, piece: Any) -> Any:
        """Keep a piece and return it."""
        self._pieces[name] = piece
        if time.monotonic() - self._written >= INTERVAL:
            self._write()
        return piece

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Write what is there when the block ends, above all when it ends by Ctrl-C or an error."""
        try:
            yield
        finally:
            if len(self._pieces) != self._saved:
                self._write()

    def remove(self) -> None:
        """The result has been written elsewhere: nothing is to be continued."""
        self.path.unlink(missing_ok=True)

    def _write(self) -> None:
        results.make_folder(self.path.parent)
        content = {"conditions": self._conditions, "pieces": self._pieces}
        atomic_write(self.path, results.to_json(content).encode())
        self._saved, self._written = len(self._pieces), time.monotonic()


def _read(path: Path, conditions: Mapping[str, Any]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
        return dict(content["pieces"]) if content["conditions"] == conditions else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
