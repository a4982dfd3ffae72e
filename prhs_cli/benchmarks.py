"""Running a benchmark from the command line: its grid, a result file that grows row by row, its tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from prhs_cli import options
from prhs_cli.errors import Interrupted
from prhs_cli.output import Output, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from prhs_calibration.operating_point import OperatingPoint
    from prhs_kernels.bench.session import Record
    from prhs_kernels.ops.retrieve.key_copy import KeyCopyKind

Number = TypeVar("Number", int, float)
CONTEXT = 32768
APPLIES = {
    "operator": ("kept", "retrieval", "key_copies", "bundle", "tune"),
    "decode": ("kept", "retrieval", "key_copies", "bundle"),
    "prefill": ("fractions",),
}
Derive = Callable[["list[Record]", str], "list[Record]"]
OPTIONS = {"key_copies": "--key-copy"}  # whose field has another name
DEFAULT_GRID = {"shapes": ("llama-3-8b",), "batches": (8,), "contexts": (CONTEXT,), "kept": (1024,)}


@dataclasses.dataclass(frozen=True)
class Request:
    """What was asked for on the command line; None where the default applies."""

    what: str
    shapes: tuple[str, ...] | None = None
    batches: tuple[int, ...] | None = None
    contexts: tuple[int, ...] | None = None
    kept: tuple[float, ...] | None = None
    retrieval: tuple[float, ...] | None = None
    fractions: tuple[float, ...] | None = None
    key_copies: tuple[str, ...] | None = None
    bundle: Path | None = None
    tune: bool = False

    def __post_init__(self) -> None:
        from prhs_kernels.errors import UsageError

        for name in ("kept", "retrieval", "fractions", "key_copies", "bundle", "tune"):
            if getattr(self, name) and name not in APPLIES[self.what]:
                option = OPTIONS.get(name, f"--{name}")
                raise UsageError(f"{option} has no meaning in prhs bench {self.what}; leave it out")

    @property
    def module(self) -> ModuleType:
        """The benchmark: `Plan`, `measure`, `derive`, `tables`, `cost`, default and toy points."""
        import importlib

        return importlib.import_module(f"prhs_kernels.bench.{self.what}")

    def plan(self, toy: bool) -> Any:
        """Points of the grid with the ratios; UsageError or InputError for what cannot be meant."""
        prefill = self.what == "prefill"
        kept, ratios = self.kept, self.fractions if prefill else self.retrieval
        copies = self.key_copies
        if self.bundle is not None:
            found = self._calibrated()
            kept, ratios = kept or (found.kept,), ratios or (found.retrieval_ratio,)
            copies = copies or (found.key_copy,)
        asked: dict[str, Any] = {
            "shapes": self.shapes, "batches": self.batches, "contexts": self.contexts, "kept": kept
        }  # fmt: skip
        given = {name: values for name, values in asked.items() if values}
        if toy:
            points = self.module.toy_points()
        elif given:
            from prhs_kernels.bench import shapes

            grid: dict[str, Any] = DEFAULT_GRID | ({"kept": (0.5,)} if prefill else {}) | given
            points = shapes.grid(**grid)
        else:
            points = self.module.default_points()
        more: dict[str, Any] = {"tune": True} if self.tune else {}
        if copies:
            more["key_copies"] = _kinds(copies)
        return self.module.Plan(points, tuple(ratios or self.module.RATIOS), **more)

    def _calibrated(self) -> OperatingPoint:
        from prhs_calibration.bundle import Bundle
        from prhs_calibration.operating_point import operating_point

        assert self.bundle is not None
        return operating_point(Bundle.load(self.bundle), max(self.contexts or (CONTEXT,)))


def _kinds(names: tuple[str, ...]) -> tuple[KeyCopyKind, ...]:
    """Kinds of scanned keys by name, each once."""
    from prhs_kernels.errors import UsageError
    from prhs_kernels.ops.retrieve.key_copy import KeyCopyKind

    known = [kind.value for kind in KeyCopyKind]
    for name in names:
        if name not in known:
            raise UsageError(f"key copy {name!r} is not known; choose from {', '.join(known)}")
    return tuple(KeyCopyKind(name) for name in dict.fromkeys(names))


def estimate(request: Request, dtype: str) -> tuple[dict[str, Any], list[RenderableType | str]]:
    """Cost in time and memory; no device is touched."""
    from prhs_kernels.bench.session import choose_dtype

    rows = request.module.cost(request.plan(toy=False), choose_dtype(dtype, "cuda"))
    total = sum(row["seconds"] for row in rows)
    shown = table(list(rows[0]), [list(row.values()) for row in rows], title="estimated cost on an H200")
    return {"seconds": total, "cases": rows}, [shown, f"about {total:.0f} s in all"]


def run(
    out: Output, request: Request, output: Path | None, *, device: str, dtype: str, seconds: float | None
) -> tuple[Path, dict[str, Any]]:
    """Measure what the result file does not hold yet; return its path and content."""
    from prhs_calibration.files import check_writable
    from prhs_kernels.bench.session import Session, choose_device, choose_dtype, device_name

    if output is not None:
        check_writable(output)
    asked = request.plan(toy=False)  # a wrong argument is the thing to say first, also where there is no GPU
    choose_dtype(dtype, "cuda")
    place = choose_device(device)
    kind, number = f"bench-{request.what}", choose_dtype(dtype, place)
    if place == "cpu":
        out.note(
            "no GPU: a trial at toy size in triton's interpreter, its times mean nothing; sizes are not used"
        )
    plan = request.plan(toy=True) if place == "cpu" else asked
    facts = {"device": device_name(place), "dtype": str(number).removeprefix("torch.")}
    result = File.open(out, output, kind, plan, facts, request.module.derive)
    session = Session(result.rows, result.write, seconds=seconds)
    try:
        with out.progress() as session.progress:
            complete = request.module.measure(plan, session, place, number)
    except KeyboardInterrupt:
        result.write(session.rows)  # it may have come between a row's end and its being written
        raise Interrupted(
            f"interrupted: {len(session.rows)} rows are kept in {result.path}; the same command goes on there"
        ) from None
    if not complete:
        out.note("out of time; the same command goes on with the cases that are left")
    return result.path, result.write(session.rows, complete=complete)


class File:
    """A result file that is whole after every row, and that a later run of the same conditions continues."""

    def __init__(
        self, path: Path, kind: str, conditions: dict[str, Any], rows: list[Record], derive: Derive
    ) -> None:
        self.path, self.kind, self.conditions, self.rows = path, kind, conditions, rows
        self.derive = derive

    @classmethod
    def open(
        cls, out: Output, asked: Path | None, kind: str, plan: Any, facts: dict[str, Any], derive: Derive
    ) -> File:
        """The asked file, else this user's newest unfinished one of these conditions, else a new one."""
        from prhs_calibration import results
        from prhs_kernels.bench.session import source_hash

        conditions = results.conditions(**facts, code=source_hash(), plan=_plain(plan))
        found = (
            asked if asked is not None and asked.exists() else results.newest(kind) if asked is None else None
        )
        rows: list[Record] = []
        if found is not None:
            old = results.read_result(found, kind=kind)
            different = _difference(old["conditions"], conditions)
            if not different and not (asked is None and old["data"]["complete"]):
                rows = old["data"]["rows"]
                asked = found
                out.note(f"continuing {found}: {len(rows)} rows are done")
            elif asked is not None and different:
                out.note(f"{asked} was measured under another {different}: starting anew")
        return cls(results.output_path(asked, kind), kind, conditions, rows, derive)

    def write(self, rows: list[Record], complete: bool = False) -> dict[str, Any]:
        """Write all rows with what follows from them; return the content of the file."""
        from prhs_calibration import results

        data = {"complete": complete, "rows": self.derive(rows, self.conditions["device"])}
        results.write_result(self.path, self.kind, self.conditions, data)
        return results.envelope(self.kind, self.conditions, data)


def rendered(request: Request, result: dict[str, Any]) -> list[RenderableType | str]:
    """The tables of a result, each followed by its notes."""
    parts: list[RenderableType | str] = []
    for drawn in request.module.tables(result["data"]["rows"], result["conditions"]["device"]):
        parts += [table(drawn.columns, drawn.rows, title=drawn.title), *drawn.notes]
    return parts


def wrong(result: dict[str, Any]) -> list[str]:
    """Keys of the rows whose result was wrong."""
    return [row["key"] for row in result["data"]["rows"] if row["status"] == "wrong"]


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The first condition in which two runs differ, of those that the figures depend on."""
    for name in ("device", "dtype", "plan", "code"):
        if old.get(name) != new[name]:
            return name
    for name in ("torch", "triton"):
        if old.get("versions", {}).get(name) != new["versions"][name]:
            return name
    return ""


def _plain(plan: Any) -> Any:
    """As it will be read back from JSON."""
    import json

    from prhs_calibration import results

    return json.loads(results.to_json(dataclasses.asdict(plan)))


def fraction(text: str) -> float:
    """A number from 0 on, also as 1/8."""
    value = float(Fraction(text))
    if value < 0:
        raise ValueError
    return value


def numbers(
    text: str | None, read: Callable[[str], Number], option: str, example: str
) -> tuple[Number, ...] | None:
    """The parts of a comma-separated option; one line for what is no such list."""
    if text is None:
        return None
    try:
        return tuple(read(part) for part in options.split_list(text))
    except (ValueError, ZeroDivisionError):
        raise typer.BadParameter(
            f"{text!r} is not a list of numbers such as {example}", param_hint=option
        ) from None
