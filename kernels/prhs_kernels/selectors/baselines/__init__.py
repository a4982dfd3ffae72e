"""Selection methods that PrHS is compared with: one method per file, a dataclass is method and configuration.

Every method is `select(rows, size) -> Choice`: the decode steps of one layer and the number of positions each
(KV head, step) may attend, in; the kept set and what was read to find it, out. So all of them run at the same
effective budget. `AtBudget` makes a method the selector of a running model. docs/selectors.md lists them.
"""

from prhs_kernels.selectors.baselines.double_sparse import DoubleSparse
from prhs_kernels.selectors.baselines.h2o import H2O
from prhs_kernels.selectors.baselines.hshare import HShare
from prhs_kernels.selectors.baselines.kascade import Kascade
from prhs_kernels.selectors.baselines.method import AtBudget, Baseline
from prhs_kernels.selectors.baselines.oracle import OracleTopK
from prhs_kernels.selectors.baselines.quest import Quest
from prhs_kernels.selectors.baselines.rows import DecodeRows, falling_rank, uniform_size
from prhs_kernels.selectors.baselines.snapkv import SnapKV
from prhs_kernels.selectors.baselines.streaming import StreamingLLM
from prhs_kernels.selectors.baselines.tidal import TidalDecode
from prhs_kernels.selectors.baselines.twilight import Twilight

__all__ = [
    "H2O",
    "AtBudget",
    "Baseline",
    "DecodeRows",
    "DoubleSparse",
    "HShare",
    "Kascade",
    "OracleTopK",
    "Quest",
    "SnapKV",
    "StreamingLLM",
    "TidalDecode",
    "Twilight",
    "falling_rank",
    "uniform_size",
]
