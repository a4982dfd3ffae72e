"""What changes while training: sequence length, learning rate, attention loss; all of progress only."""

import math

STAGES: tuple[tuple[int, float], ...] = ((128, 0.10), (256, 0.10), (512, 0.15), (1024, 0.25), (2048, 0.40))
PEAK_LR = 2e-3
_WARMUP, _FLOOR = 0.02, 0.02


def stage_at(progress: float, context_length: int) -> tuple[int, float]:
    """(sequence length, progress at which this length ends) for progress in [0, 1]."""
    end = 0.0
    for length, share in STAGES:
        end += share
        if length >= context_length:
            return context_length, 1.0
        if progress < end - 1e-9:
            return length, end
    return context_length, 1.0


def learning_rate(progress: float, peak: float = PEAK_LR) -> float:
    """Linear warm-up over 2 % of the run, then a cosine to 2 % of the peak."""
    if progress < _WARMUP:
        return peak * max(progress, 1e-4) / _WARMUP
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - _WARMUP) / (1 - _WARMUP))))
    return peak * (_FLOOR + (1 - _FLOOR) * cosine)


def attention_loss_weight(progress: float) -> float:
    """Weight of the auxiliary loss: 1 for the first 40 %, falling to 0 at half of the run."""
    return min(1.0, max(0.0, (0.5 - progress) / 0.1))


# (sequence length, share of the run, batches per step): the second model's curriculum, larger steps late
LONG_STAGES: tuple[tuple[int, float, int], ...] = (
    (256, 0.08, 1),
    (512, 0.09, 1),
    (1024, 0.16, 1),
    (2048, 0.20, 1),
    (4096, 0.20, 2),
    (8192, 0.27, 2),
)
# the same for a fine-tune: mostly short rows, the whole context at the end
FINE_TUNE_STAGES: tuple[tuple[int, float, int], ...] = (
    (512, 0.15, 1),
    (1024, 0.25, 1),
    (2048, 0.40, 1),
    (4096, 0.10, 1),
    (8192, 0.10, 1),
)
_STABLE = 0.4  # of the run at the peak rate, then down in a line


def long_stage(
    progress: float,
    context_length: int,
    stages: tuple[tuple[int, float, int], ...] = LONG_STAGES,
    shortest: int = 0,
) -> tuple[int, int]:
    """(sequence length, batches per step) for progress in [0, 1], without the stages below `shortest`."""
    kept = [stage for stage in stages if stage[0] >= min(shortest, context_length)] or [stages[-1]]
    whole = sum(share for _, share, _ in kept)
    end = 0.0
    for length, share, batches in kept:
        end += share / whole
        if length >= context_length or progress < end - 1e-9:
            return min(length, context_length), batches
    return context_length, kept[-1][2]


def long_learning_rate(progress: float, peak: float = PEAK_LR) -> float:
    """Linear warm-up over 2 % of the run, the peak until 40 %, then a line down to 2 % of the peak.

    A cosine would leave almost nothing for the longest sequences, which come last.
    """
    if progress < _WARMUP:
        return peak * max(progress, 1e-4) / _WARMUP
    left = min(1.0, (1 - min(progress, 1.0)) / (1 - _STABLE))
    return peak * (_FLOOR + (1 - _FLOOR) * left)


def long_attention_weight(progress: float) -> float:
    """Weight of the auxiliary loss: 1 for the first 15 %, falling to 0 at a quarter of the run."""
    return min(1.0, max(0.0, (0.25 - progress) / 0.1))
