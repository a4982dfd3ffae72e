"""Paired bootstrap intervals: examples are the unit, and every selector is resampled with the same ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

Array = np.ndarray
RESAMPLES = 2000


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """A figure of one task: on the examples at hand, and on each set of resampled examples.

    mean: the figure. resampled: `[resamples]`. count: number of examples. constant: all examples agree.
    """

    mean: float
    resampled: Array
    count: int
    constant: bool


class PairedBootstrap:
    """Resamples of `count` examples, the same for everything that is measured on them.

    Percentile bootstrap: `low` and `high` are quantiles of the resampled figure.
    """

    def __init__(self, count: int, *, seed: Sequence[int], resamples: int = RESAMPLES) -> None:
        self._draws = np.random.default_rng(list(seed)).integers(0, count, (resamples, count))

    def sample(
        self,
        values: Array,
        weights: Array,
        reference: Array | None = None,
        transform: Callable[[Array], Array] | None = None,
    ) -> Sample:
        """Weighted mean of `values` `[count]`, through `transform`, less that of `reference` if one is given.

        Args:
            weights: `[count]`, positive; tokens where values are means over tokens.
            transform: applied to the means, for example `numpy.exp` for a perplexity.
        """
        mean, resampled = self._figure(values, weights, transform)
        agreeing = values
        if reference is not None:
            other, others = self._figure(reference, weights, transform)
            mean, resampled, agreeing = mean - other, resampled - others, values - reference
        return Sample(mean, resampled, len(values), bool((agreeing == agreeing[0]).all()))

    def _figure(
        self, values: Array, weights: Array, transform: Callable[[Array], Array] | None
    ) -> tuple[float, Array]:
        change = transform or (lambda means: means)
        total = np.asarray((values * weights).sum() / weights.sum())
        draws = (values * weights)[self._draws].sum(1) / weights[self._draws].sum(1)
        return float(change(total)), change(draws)


def average(samples: Sequence[Sample]) -> Sample:
    """Mean over tasks with equal weight; each task's examples are resampled within the task."""
    return Sample(
        mean=float(np.mean([one.mean for one in samples])),
        resampled=np.mean([one.resampled for one in samples], axis=0),
        count=sum(one.count for one in samples),
        constant=all(one.constant for one in samples),
    )


def interval(
    sample: Sample, confidence: float, limits: tuple[float, float] | None = None
) -> dict[str, float | None]:
    """`mean`, `low` and `high`; no bounds with a single example.

    Args:
        limits: least and greatest value of one example. Where all examples agree a bootstrap has nothing to
            resample; the bound is then the exact one on how often an example may still do otherwise
            (Clopper and Pearson: with n agreeing examples `1 - (alpha / 2) ** (1 / n)`). Without limits that
            cannot be said, and there are no bounds.
    """
    tail = (1 - confidence) / 2
    if sample.constant:
        if limits is None:
            return {"mean": sample.mean, "low": None, "high": None}
        rare = 1 - tail ** (1 / sample.count)
        low, high = (sample.mean + rare * (limit - sample.mean) for limit in limits)
    elif sample.count < 2:
        low = high = None
    else:
        low, high = (float(q) for q in np.quantile(sample.resampled, [tail, 1 - tail]))
    return {"mean": sample.mean, "low": low, "high": high}
