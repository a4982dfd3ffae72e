"""Selection methods that PrHS is compared with: one method per file, a dataclass is method and configuration.

Every method is `select(rows, size) -> kept`: the decode steps of one layer and the number of positions each
(KV head, step) may attend, in; the kept set, out. So all of them run at the same effective budget.
`rows_read(rows, kept)` says what a decode step loads from the cache, scans included. `AtBudget` makes a
method the selector of a running model.
"""

from prhs_kernels.selectors.baselines.at_budget import AtBudget
from prhs_kernels.selectors.baselines.oracle import OracleTopK
from prhs_kernels.selectors.baselines.quest import Quest
from prhs_kernels.selectors.baselines.rows import Baseline, DecodeRows, uniform_size
from prhs_kernels.selectors.baselines.streaming import StreamingLLM

__all__ = ["AtBudget", "Baseline", "DecodeRows", "OracleTopK", "Quest", "StreamingLLM", "uniform_size"]
