"""A sparse model as lm-evaluation-harness sees one: likelihoods and greedy text, by decode steps."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from prhs_calibration.evaluation import rows
from prhs_kernels.errors import InputError
from prhs_kernels.runtime.decode import Generation, generate_tokens
from prhs_kernels.runtime.sampling import Sampling
from prhs_kernels.runtime.scoring import Scorer
from prhs_kernels.runtime.stats import DecodeStats

try:
    from lm_eval.api.model import LM, TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:  # the extra `eval` is missing, which `lm_harness.require` says before this is used
    LM = TemplateLM = object

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from prhs_calibration.evaluation.points import Point
    from prhs_calibration.evaluation.store import Store
    from prhs_calibration.models import LoadedModel

Answer = Callable[["Point"], tuple[Any, DecodeStats]]

MAX_NEW_TOKENS = 256  # where a task sets no limit, as the harness's own models have it


class Recorder(LM):  # type: ignore[misc]
    """Remembers what it is asked about and answers nothing: to see the contexts of tasks before running them.

    seen: task, text, and whether the text is scored from its start instead of being a context.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str, bool]] = []

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        self.seen += [(request.task_name, request.args[0], False) for request in requests]
        return [(0.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        self.seen += [(request.task_name, request.args[0], True) for request in requests]
        return [0.0] * len(requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        self.seen += [(request.task_name, request.args[0], False) for request in requests]
        return [""] * len(requests)


class PrhsLM(TemplateLM):  # type: ignore[misc]
    """One model, per task at an operating point. All of a prompt but its last token is prefill; what follows
    are decode steps.

    Answers are kept in `store`, with what they read and kept; `stats` sums the latter by task, over all
    requests, those answered before an interruption included.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        points: Mapping[str, Point],
        *,
        store: Store,
        seed: int = 0,
        report: Callable[[str, int, int], None] = lambda stage, done, total: None,
    ) -> None:
        super().__init__()
        self.loaded, self.points = loaded, points
        self.tokenizer = loaded.tokenizer
        self.stats = {task: DecodeStats() for task in points}
        self._store, self._seed, self._report = store, seed, report
        self._device = loaded.device
        self._asked: dict[str, int] = {}
        self._tasks: list[str] = []  # of the requests that are being tokenised

    @property
    def eot_token_id(self) -> int:
        return _first(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the start token where the model has one."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else int(start)

    @property
    def max_length(self) -> int:
        return self.loaded.context_length

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; the tokenizer's own start token comes first, unless the text brings it."""
        start = self.tokenizer.bos_token
        special = add_special_tokens is not False and not (start and string.startswith(start))
        return list(self.tokenizer(string, add_special_tokens=special, verbose=False).input_ids)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation in nats, and whether greedy decoding would write it."""
        self._tasks = [request.task_name for request in requests]
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        def answer(context: list[int], continuation: list[int]) -> Answer:
            return lambda point: self._score(point, context, continuation)

        found = self._all(
            "loglikelihood",
            [
                (task, texts, answer(context, continuation))
                for task, (texts, context, continuation) in zip(self._tasks, requests, strict=True)
            ],
        )
        return [(float(likelihood), bool(greedy)) for likelihood, greedy in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of whole texts in nats; a text beyond the context goes in windows."""

        def answer(text: str) -> Answer:
            return lambda point: self._roll(point, text)

        found = self._all(
            "rolling likelihood", [(one.task_name, one.args, answer(one.args[0])) for one in requests]
        )
        return [float(likelihood) for likelihood in found]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Text up to the first stop sequence, by the decode loop."""

        def answer(context: str, settings: dict[str, Any], seed: int) -> Answer:
            return lambda point: self._generate(point, context, settings, seed)

        found = self._all(
            "generation",
            [
                (one.task_name, one.args, answer(one.args[0], one.args[1], self._seed + at))
                for at, one in enumerate(requests)
            ],
        )
        return [str(text) for text in found]

    def _all(self, kind: str, requests: Sequence[tuple[str, Sequence[Any], Answer]]) -> list[Any]:
        """Answers of requests (task, arguments, how to answer), kept ones or new ones."""
        found = []
        for at, (task, arguments, answer) in enumerate(requests):
            point = self.points[task]
            self._report(f"{kind}, {point.name}", at, len(requests))
            found.append(self._once(task, point, [kind, *arguments], answer))
            self._report(f"{kind}, {point.name}", at + 1, len(requests))
        return found

    def _once(self, task: str, point: Point, request: Sequence[Any], answer: Answer) -> Any:
        digest = hashlib.sha256(json.dumps(request, default=str).encode()).hexdigest()[:32]
        name = f"items/{task}/{point.name}/{digest}"
        repeat = self._asked[name] = self._asked.get(name, 0) + 1
        piece = self._store.get(f"{name}/{repeat}")
        if piece is None:
            found, stats = answer(point)
            piece = self._store.put(f"{name}/{repeat}", {"answer": found, "stats": rows.sums(stats)})
        self.stats[task] = self.stats[task].merged(DecodeStats(**piece["stats"]))
        return piece["answer"]

    def _score(
        self, point: Point, context: list[int], continuation: list[int]
    ) -> tuple[list[float | bool], DecodeStats]:
        """Log-likelihood and greediness of `continuation`, every token of it predicted by a decode step."""
        continuation = continuation[-self.max_length :]
        context = context[-max(self.max_length + 1 - len(continuation), 1) :]
        if not continuation:
            return [0.0, True], DecodeStats()
        tokens = [*context, *continuation][:-1]
        prefill = max(len(context) - 1, 1)
        found, stats = [], DecodeStats()
        if len(context) == 1:  # a single position: there is nothing to select yet
            with torch.inference_mode():
                ids = torch.tensor([context], device=self.loaded.model.device)
                found.append(self.loaded.model(input_ids=ids).logits[0, -1:])
        if len(tokens) > prefill:
            result = Scorer(self.loaded.model, tokens, prefill).run(point.params, None, point.chooser)
            found, stats = [*found, result.logits], result.stats
        logits = torch.cat(found).float()
        wanted = torch.tensor(continuation, device=logits.device)
        likelihood = logits.log_softmax(-1).gather(-1, wanted[:, None]).double().sum()
        return [float(likelihood), bool((logits.argmax(-1) == wanted).all())], stats

    def _roll(self, point: Point, text: str) -> tuple[float, DecodeStats]:
        windows = get_rolling_token_windows(
            self.tok_encode(text, add_special_tokens=False), self.prefix_token_id, self.max_length, 1
        )
        total, stats = 0.0, DecodeStats()
        for window in windows:
            (likelihood, _), part = self._score(point, *make_disjoint_window(window))
            total, stats = total + likelihood, stats.merged(part)
        return total, stats

    def _generate(
        self, point: Point, context: str, settings: dict[str, Any], seed: int
    ) -> tuple[str, DecodeStats]:
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
        limit = int(settings.get("max_gen_toks", settings.get("max_new_tokens", MAX_NEW_TOKENS)))
        if not 0 < limit < self.max_length - 1:
            raise InputError(
                f"the task asks for {limit} new tokens, the context of {self.loaded.model_id} is "
                f"{self.max_length}; choose another model or task"
            )
        tokens = (self.tok_encode(context) or [self.prefix_token_id])[limit - self.max_length :]
        run = Generation()
        stream: Any = generate_tokens(
            self.loaded.model,
            [tokens],
            point.params,
            max_new_tokens=limit,
            sampling=_sampling(settings, seed),
            stop_token_ids=self._stop_ids(),
            run=run,
            selector=point.chooser,
            prompt_steps=min(1, len(tokens) - 1),
        )
        written: list[int] = []
        text = ""
        with contextlib.closing(stream):
            for (token,) in stream:
                written += [] if token is None else [token]
                text = str(self.tokenizer.decode(written, skip_special_tokens=True))
                if any(stop in text for stop in stops):
                    break
        return _before(text, stops), run.stats

    def _stop_ids(self) -> list[int]:
        config: Any = self.loaded.model.generation_config
        ids = getattr(config, "eos_token_id", None)
        ids = [ids] if isinstance(ids, int) else list(ids or [])
        return sorted({*ids, self.eot_token_id})


def _sampling(settings: dict[str, Any], seed: int) -> Sampling:
    if not settings.get("do_sample", False):
        return Sampling()
    return Sampling(float(settings.get("temperature", 1.0)), float(settings.get("top_p", 1.0)), seed)


def _before(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stop sequences."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def _first(ids: int | list[int] | None) -> int:
    if ids is None:
        raise InputError("the tokenizer has no end-of-text token, which the harness needs; add eos_token")
    return int(ids[0]) if isinstance(ids, list) else int(ids)
