"""`prhs models`: names, what is on disk, model cards, and this user's bundles."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from prhs_cli import options
from prhs_cli.output import Output, table

EPILOG = """\b
Examples:
  prhs models
  prhs models --card reference-8k
  prhs models --remove llama-3-8b-1a2b3c4d-delta0.02"""


def command(
    remove: Annotated[
        str | None,
        typer.Option(metavar="BUNDLE", help="Delete this bundle of yours, by name.", show_default=False),
    ] = None,
    card: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Show an embedded model's card: data, training, figures.",
            show_default=False,
        ),
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """List models, which are on this machine, and your bundles."""
    out = Output(as_json=as_json, quiet=quiet)
    from prhs_calibration import bundle_store, models

    if card is not None:
        text = models.model_card(card)
        return out.result({"model": card, "card": text}, text)
    if remove is not None:
        path = bundle_store.remove(remove)
        return out.result({"removed": str(path)}, f"removed {path}")
    names = [dataclasses.asdict(known) for known in models.list_models()]
    bundles = [_bundle(stored) for stored in bundle_store.list_bundles()]
    out.result({"models": names, "bundles": bundles}, *_render(names, bundles))


def _bundle(stored: Any) -> dict[str, Any]:
    metadata = stored.metadata
    facts = {"name": stored.name, "path": str(stored.path), "problem": stored.problem}
    if metadata is not None:
        facts |= {"model": metadata.model_id, "delta": metadata.delta, "target": metadata.target}
    return facts


def _render(names: list[dict[str, Any]], bundles: list[dict[str, Any]]) -> list[Any]:
    rows = [[known["alias"], known["model_id"], known["on_disk"]] for known in names]
    known_models = table(["name", "model", "on disk"], rows, title="models")
    if not bundles:
        return [known_models, "you have no bundles yet; `prhs calibrate MODEL` makes one"]
    rows = [[b["name"], b.get("model"), b.get("delta"), b["problem"] or "usable"] for b in bundles]
    return [known_models, table(["name", "model", "δ", "state"], rows, title="your bundles")]
