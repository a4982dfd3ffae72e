"""What a run of `prhs generate` works with: model, bundle and settings, and the record of its batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prhs_cli import prompting
from prhs_cli.loading import Source
from prhs_cli.output import Output
from prhs_cli.prompt_files import Prompt
from prhs_kernels.errors import UsageError
from prhs_kernels.runtime.distributed import launched

if TYPE_CHECKING:
    from prhs_calibration.memory import Room
    from prhs_calibration.models import LoadedModel
    from prhs_kernels.params import SelectorParams
    from prhs_kernels.runtime.batches import Request
    from prhs_kernels.runtime.decode import Generation
    from prhs_kernels.runtime.sampling import Sampling


@dataclasses.dataclass
class Job:
    """A loaded model and what all its prompts have in common.

    variants: "sparse" and its parameters, and "dense" when it is compared. facts: what a report names.
    settings: more arguments of `generate_tokens`. runs, lengths: per variant, what each batch recorded and
    how many tokens each of its sequences got.
    """

    out: Output
    loaded: LoadedModel
    variants: Mapping[str, SelectorParams]
    facts: Mapping[str, Any]
    sampling: Sampling
    settings: Mapping[str, Any]
    stops: tuple[int, ...]
    room: Room
    runs: dict[str, list[Generation]] = dataclasses.field(default_factory=dict)
    lengths: dict[str, list[list[int]]] = dataclasses.field(default_factory=dict)
    _noted: set[str] = dataclasses.field(default_factory=set)
    _share: float | None = None

    @classmethod
    def prepare(
        cls,
        out: Output,
        source: Source,
        delta: float | None,
        sampling: Sampling,
        settings: Mapping[str, Any],
        *,
        dense: bool,
    ) -> Job:
        """Load model and bundle, the bundle at its own operating point or at that of `delta`."""
        from prhs_calibration.memory import Room
        from prhs_kernels.runtime.attach import dense_params

        _check_backend(settings["backend"], source)
        loaded, bundle = source.open(out)
        config = loaded.model.config
        dial = bundle.metadata.dial_index if delta is None else bundle.dial_for(delta)
        facts = {
            "model": loaded.model_id,
            "bundle": str(bundle.path),
            "delta": bundle.metadata.delta if delta is None else delta,
            "lambda": float(bundle.dial[dial]),
        }
        variants = {"sparse": bundle.params(dial)} | ({"dense": dense_params(config)} if dense else {})
        if settings["audit"] is not None and variants["sparse"].layer is not None:
            out.note(
                "the audit measures against the keys in use; what ETF's frozen prompt tokens change is the "
                "calibration's estimate"
            )
        stops = prompting.stop_token_ids(loaded.model, loaded.tokenizer)
        room = Room.of(loaded.model, variants["sparse"])
        return cls(out, loaded, variants, facts, sampling, settings, stops, room)

    def requests(self, prompts: Sequence[Prompt], raw: bool, asked: int) -> list[Request]:
        """Token ids and limit of every prompt; notes what the context cuts."""
        from prhs_kernels.runtime.batches import Request

        context, requests, cut = self.loaded.context_length, [], []
        for prompt in prompts:
            tokens = prompting.encode_prompt(self.loaded.tokenizer, prompt, raw=raw)
            wanted = prompt.max_new_tokens or asked
            limit = prompting.new_token_limit(len(tokens), wanted, context, prompt.where)
            cut += [(limit, prompt.where)] * (limit < wanted)
            requests.append(Request(tokens, limit))
        if cut:
            limit, where = min(cut)
            others = f" (and {len(cut) - 1} other prompts are cut)" if len(cut) > 1 else ""
            self.out.note(f"{where}: at most {limit} new tokens fit the context of {context}{others}")
        return requests

    def steps(
        self, variant: str, requests: Sequence[Request], made: list[list[int]], names: Sequence[str]
    ) -> Iterator[list[int | None]]:
        """Run one batch and yield every step's tokens, `made` growing by them; records the run at its end.

        names: of the prompts, by which they sample alike in any batch.
        """
        from prhs_kernels.runtime.batches import generate_batch
        from prhs_kernels.runtime.decode import Generation

        run, params = Generation(), self.variants[variant]
        own = {"audit": None if params.is_dense else self._coin(requests)}
        sampling = dataclasses.replace(self.sampling, streams=tuple(names))
        made += [[] for _ in requests]
        with self.room.explained(width(requests), len(requests)):
            for tokens in generate_batch(
                self.loaded.model,
                requests,
                params,
                run=run,
                sampling=sampling,
                stop_token_ids=self.stops,
                **{**self.settings, **own},
            ):
                for row, token in zip(made, tokens, strict=True):
                    row += [] if token is None else [token]
                self._note_once(run.notes)
                yield tokens
        self.runs.setdefault(variant, []).append(run)
        self.lengths.setdefault(variant, []).append([len(row) for row in made])

    def _coin(self, requests: Sequence[Request]) -> float | None:
        """Probability of the audit's coin; `auto` is decided once, for the first batch, the largest."""
        from prhs_kernels.runtime.auditing import affordable_share

        audit: float | str | None = self.settings["audit"]
        if audit == "auto":
            heads = self.variants["sparse"].num_kv_heads
            self._share = self._share or affordable_share(len(requests) * heads)
            return self._share
        return audit  # type: ignore[return-value]

    def _note_once(self, notes: Sequence[str]) -> None:
        for note in notes:
            subject = note.split(":")[0]  # behind it stand figures that differ from batch to batch
            if subject not in self._noted:
                self._noted.add(subject)
                self.out.note(note)

    def conditions(self) -> dict[str, Any]:
        """What an answer depends on beside its prompt and its limit."""
        from prhs_calibration.fingerprint import hash_files

        return {
            "weights": self.loaded.weights_hash,
            "bundle": hash_files([Path(self.facts["bundle"])]),
            "lambda": self.facts["lambda"],
            "dtype": str(self.loaded.dtype),
            "sampling": dataclasses.asdict(self.sampling),
            "variants": list(self.variants),
            **self.settings,
        }

    def ended(self, request: Request, made: Sequence[int]) -> str | None:
        """Why a sequence ended: "stop", "length", or None while it goes on."""
        if made and made[-1] in self.stops:
            return "stop"
        return "length" if len(made) >= request.max_new_tokens else None

    def answer(self, request: Request, made: Sequence[int]) -> dict[str, Any]:
        """What one variant wrote."""
        text = self.loaded.tokenizer.decode(list(made), skip_special_tokens=True)
        return {"text": str(text), "tokens": list(made), "finish": self.ended(request, made)}

    def summary(self) -> dict[str, dict[str, Any]]:
        """Counts, speed and budgets of everything that ran, per variant."""
        from prhs_kernels.runtime.batches import summarize

        delta = self.facts["delta"]
        return {name: summarize(self.runs[name], self.lengths[name], delta) for name in self.runs}


def settings(backend: str, mode: str, audit: float | str | None, *, compares: bool) -> dict[str, Any]:
    """Arguments of `generate_tokens`; UsageError for options that exclude each other."""
    if audit is not None and mode == "released":
        raise UsageError(
            "--audit and --mode released exclude each other: what was freed cannot be measured; leave one out"
        )
    # whoever compares, audits, releases or names a backend wants sparse attention, be it slower
    fallback = backend == "auto" and mode == "audited" and audit is None and not compares
    return {"backend": backend, "mode": mode, "audit": audit, "dense_fallback": fallback}


def _check_backend(backend: Any, source: Source) -> None:
    """ResourceError before the model is loaded when the backend cannot run on the device asked for."""
    import torch

    from prhs_calibration.devices import resolve_device
    from prhs_kernels.ops.backend import use_triton

    if launched().size == 1:
        use_triton(backend, torch.empty(0, device=resolve_device(source.device)))


def width(requests: Sequence[Request]) -> int:
    """Cache slots of a batch of these: the longest prompt, and the most new tokens."""
    return max(len(r.tokens) for r in requests) + max(r.max_new_tokens for r in requests)
