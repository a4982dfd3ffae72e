"""Coins of the audit and the sums of dropped mass, in plain PyTorch."""

from __future__ import annotations

import math

import pytest
import torch

from prhs_kernels.errors import UsageError
from prhs_kernels.ops.audit.api import count_dropped, draw_coins
from prhs_kernels.ops.audit.reference import philox
from prhs_kernels.ops.audit.state import StepAudit
from prhs_kernels.ops.retrieve.state import Decision, RetrievalState


def test_philox_gives_the_published_numbers() -> None:
    """First word of the known answer of Random123 for counter and key zero."""
    assert int(philox(0, torch.zeros(1, dtype=torch.int64))) == 0x6627E8D5


def test_coins_fall_as_often_as_they_should_and_differ_between_steps_and_layers() -> None:
    audit = StepAudit.allocate(0.2, [3, 4], 8, 16, 4, "cpu")
    rows = []
    for step in range(200):
        audit.step.fill_(step)
        draw_coins(audit)
        rows.append(audit.coin.flatten(1) == 1)
    drawn = list(torch.stack(rows, dim=1))
    for coins in drawn:
        expected, deviation = 0.2 * coins.numel(), math.sqrt(0.16 * coins.numel())
        assert abs(int(coins.sum()) - expected) < 5 * deviation
    both = int((drawn[0] & drawn[1]).sum())
    assert abs(both - 0.04 * drawn[0].numel()) < 5 * math.sqrt(0.04 * drawn[0].numel())
    again = int((drawn[0][1:] & drawn[0][:-1]).sum())
    assert abs(again - 0.04 * drawn[0][1:].numel()) < 5 * math.sqrt(0.04 * drawn[0].numel())


@pytest.mark.parametrize(("probability", "falls"), [(0.0, False), (1.0, True)])
def test_never_and_always(probability: float, falls: bool) -> None:
    audit = StepAudit.allocate(probability, [0], 4, 64, 1, "cpu")
    draw_coins(audit)
    assert bool((audit.coin == falls).all())


@pytest.mark.parametrize("exact", [True, False])
def test_dropped_mass_of_every_kind_of_unit(exact: bool) -> None:
    """Four heads: shares without a coin, shares with one, retrieves (with a coin), keeps all (with one).

    In a second layer everything is kept.
    """
    state = RetrievalState.allocate(2, 4, 2, 8, 4, torch.float32, "cpu")
    state.decision.fill_(Decision.KEEP_ALL)
    state.decision[0, :3] = torch.tensor([Decision.SHARE, Decision.SHARE, Decision.RETRIEVE])
    audit = StepAudit.allocate(0.5, [0, 1], 1, 4, 2, "cpu")
    audit.coin.copy_(torch.tensor([0, 1, 1, 1]))
    whole = torch.tensor([2.0, 3.0])
    audit.lse.copy_(whole)
    state.lse.copy_(whole if exact else torch.tensor(torch.nan))
    share = torch.tensor([[0.5, 0.75], [0.9, 0.8], [0.6, 1.0], [1.0, 1.0]])  # of the mass that is kept
    kept = (whole + share.log()).reshape(1, 1, 8, 1).expand(2, -1, -1, -1)
    for _ in range(3):
        decision, lse = state.decision.view(2, 1, 4), state.lse.view(2, 1, 4, 2)
        count_dropped(kept, audit, decision=decision, lse=lse if exact else None)
    assert audit.units[1].tolist() == [12, 0, 0] and not audit.sums[1].any()
    audit.units[1] = 0
    totals = audit.totals()
    audited, retrieved = 3 * 0.15, 3 * 0.2
    if exact:
        assert (totals.exact_units, totals.audited_units, totals.other_units) == (6, 3, 6)
        assert totals.exact_mass == pytest.approx(retrieved, rel=1e-5)
        assert totals.audited_mass == pytest.approx(audited, rel=1e-5)
    else:
        assert (totals.exact_units, totals.audited_units, totals.other_units) == (3, 6, 9)
        assert totals.exact_mass == 0
        assert totals.audited_mass == pytest.approx(audited + retrieved, rel=1e-5)


def test_a_probability_is_one() -> None:
    with pytest.raises(UsageError, match="audit probability = 1.5 must be between 0 and 1"):
        StepAudit.allocate(1.5, [0], 1, 1, 1, "cpu")
