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
