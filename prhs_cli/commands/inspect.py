"""`prhs inspect`: what is in a bundle."""

from __future__ import annotations

from math import nan
from typing import TYPE_CHECKING, Any

from prhs_cli import options
from prhs_cli.output import Output, pairs, table

if TYPE_CHECKING:
    from prhs_calibration.bundle import Bundle

EPILOG = """\b
Examples:
  prhs inspect reference.safetensors
  prhs inspect reference.safetensors --json
  prhs models                              lists the bundles you have"""


def command(
    bundle: options.BundleArgument, as_json: options.Json = False, quiet: options.Quiet = False
) -> None:
    """Show what a bundle promises, for what, and its selectors."""
    from prhs_calibration.bundle import Bundle

    loaded = Bundle.load(bundle)
    data = describe(loaded)
    Output(as_json=as_json, quiet=quiet).result(data, *_render(data))


def describe(bundle: Bundle) -> dict[str, Any]:
    """Plain values: metadata, axes, the dial with its measured loss, budgets at the operating point."""
    import dataclasses

    import torch

    metadata, index = bundle.metadata, bundle.metadata.dial_index
    tensors = {name: bundle.tensors[f"time/{name}"] for name in ("gate", "tau_cos", "block", "dilation")}
    ratio, tokens = bundle.tensors["time/budget_ratio"][index], bundle.tensors["time/budget_tokens"][index]
    points = zip(bundle.dial.tolist(), bundle.mean_loss.tolist(), strict=True)
    dial = [{"lambda": lam, "mean_loss": loss} for lam, loss in points]
    for point, tail in zip(dial, bundle.tensors.get("profile/tail", torch.tensor([])).tolist(), strict=False):
        point["tail"] = tail
    return {
        "path": str(bundle.path),
        "metadata": dataclasses.asdict(metadata),
        "operating_point": {"index": index, **dial[index]},
        "dial": dial,
        "depth": _schedule(bundle, "depth", ("start_layer", "phi", "alpha")),
        "layer": _schedule(bundle, "layer", ("start_layer", "psi", "gamma")),
        "time": {
            "budget_ratio": ratio.tolist(),
            "budget_tokens": tokens.tolist(),
            **{name: tensor.tolist() for name, tensor in tensors.items()},
        },
        "tensors": {name: list(tensor.shape) for name, tensor in sorted(bundle.tensors.items())},
    }


def _schedule(bundle: Bundle, axis: str, names: tuple[str, ...]) -> dict[str, float] | None:
    values = bundle.tensors.get(f"{axis}/schedule")
    return None if values is None else dict(zip(names, values.tolist(), strict=True))


def _render(data: dict[str, Any]) -> list[Any]:
    metadata, point = data["metadata"], data["operating_point"]
    facts = {
        "model": f"{metadata['model_id']} ({metadata['revision']})",
        "shape": _join(metadata["fingerprint"], ("num_layers", "num_qo_heads", "num_kv_heads", "head_dim")),
        "promise": f"dropped mass at most δ = {metadata['delta']:g}, {_target(metadata)}",
        "prompts": _join(metadata["split_sizes"], ("fit", "select", "verify"))
        + f", up to {metadata['context_length']} tokens",
        "operating point": f"λ = {point['lambda']:.4g}, mean loss {point['mean_loss']:.4g} on select prompts"
        + (f", {point['tail']:.4g} in the worst steps (measured)" if "tail" in point else ""),
        "retrievals scan": f"{metadata['key_copy']} keys",
        "always kept": f"{metadata['num_sinks']} sinks, {metadata['num_local']} local positions",
        "depth axis (PSAW)": _axis(data["depth"]),
        "layer axis (ETF)": _axis(data["layer"], f", {metadata['freeze_mode']}"),
        "versions": _join(metadata["library_versions"], sorted(metadata["library_versions"])),
    }
    return [pairs(facts, title=data["path"]), _heads(data["time"]), _dial(data["dial"], point["index"])]


def _heads(time: dict[str, Any]) -> Any:
    """One row per layer, the values of its KV heads side by side."""
    gates = ("never", "post", "pre")
    columns = ["layer", "budget ratio", "+ tokens", "gate (RoPE)", "τ_cos", "block s", "dilation r"]
    rows = []
    for layer, ratios in enumerate(time["budget_ratio"]):
        cells = (
            (f"{value:.3f}" for value in ratios),
            time["budget_tokens"][layer],
            (gates[value] for value in time["gate"][layer]),
            (f"{value:.2f}" for value in time["tau_cos"][layer]),
            time["block"][layer],
            time["dilation"][layer],
        )
        rows.append([layer, *(_shared(cell) for cell in cells)])
    return table(columns, rows, title="time axis (CIS) at the operating point, per KV head")


def _dial(dial: list[dict[str, float]], operating: int) -> Any:
    rows = [
        [f"{p['lambda']:.4g}{' *' * (i == operating)}", f"{p['mean_loss']:.4g}", f"{p.get('tail', nan):.4g}"]
        for i, p in enumerate(dial)
    ]
    columns = ["λ (* operating point)", "mean loss on the select prompts", "in the worst steps"]
    return table(columns, rows, title="risk curve, closed loop")


def _shared(values: Any) -> str:
    """The values of all heads, once if they are equal."""
    texts = [str(value) for value in values]
    return texts[0] if len(set(texts)) == 1 else " ".join(texts)


def _join(mapping: dict[str, Any], names: Any) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {mapping[name]}" for name in names)


def _target(metadata: dict[str, Any]) -> str:
    if metadata["target"] == "expected":
        return "expected over prompts (conformal risk control)"
    return f"for this bundle with probability {metadata['confidence']:g} (learn then test)"


def _axis(schedule: dict[str, float] | None, more: str = "") -> str:
    if schedule is None:
        return "off"
    names = {"start_layer": "from layer", "phi": "φ =", "alpha": "α =", "psi": "ψ =", "gamma": "γ ="}
    return ", ".join(f"{names[key]} {value:.4g}" for key, value in schedule.items()) + more
