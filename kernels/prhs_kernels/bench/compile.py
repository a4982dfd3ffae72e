"""Compile every kernel without a GPU and read registers, stack and shared memory from the result.

`python -m prhs_kernels.bench.compile [--pairwise] [--jobs N] [--json OUT]`; exit code 1 if a kernel spills.
Needs triton, which brings ptxas and cuobjdump.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from prhs_kernels.errors import PrhsError, ResourceError
from prhs_kernels.ops.backend import HEAD_DIMS, has_triton, interpreted
from prhs_kernels.ops.decode_config import DecodeConfig, max_registers, next_power_of_2, precision, tile
from prhs_kernels.ops.retrieve.config import scan_tile, select_config
from prhs_kernels.ops.retrieve.state import chunk_size
from prhs_kernels.ops.window_prefill.api import PREFILL_HEAD_DIMS
from prhs_kernels.ops.window_prefill.config import prefill_config

ARCHITECTURES = (80, 90, 100)
DTYPES = ("bf16", "fp16", "fp32")
GROUPS = (1, 4, 7, 16)
ROW_LENGTHS = (1024, 4096, 16384, 32768, 1048576)  # up to 32768 in registers, looped over beyond
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel for one shape. An axis that the kernel does not have holds 0 or an empty name."""

    kernel: str
    arch: int
    head_dim: int = 0
    dtype: str = ""
    group: int = 0
    length: int = 0  # slots of the cache


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a compiled kernel needs: registers per thread, bytes of stack and local memory per thread, bytes
    of shared memory per program, asynchronous copies in the code, threads per program."""

    registers: int
    stack: int
    local: int
    shared: int
    async_copies: int
    threads: int

    @property
    def spills(self) -> bool:
        return self.stack > 0 or self.local > 0


def full_grid() -> list[Case]:
    """Every kernel with every value of its axes."""
    heads = list(itertools.product(ARCHITECTURES, HEAD_DIMS, DTYPES, GROUPS))
    cases = [Case(k, *axes) for k in ("sparse_decode", "dense_decode", "scan", "gate") for axes in heads]
    cases += [Case("merge_state", a, d, t) for a, d, t in itertools.product(ARCHITECTURES, HEAD_DIMS, DTYPES)]
    prefill = itertools.product(ARCHITECTURES, PREFILL_HEAD_DIMS, DTYPES)
    cases += [Case("window_prefill", a, d, t) for a, d, t in prefill]
    for arch, length in itertools.product(ARCHITECTURES, ROW_LENGTHS):
        cases += [Case("weigh", arch, group=group, length=length) for group in GROUPS]
        cases.append(Case("select", arch, length=length))
    return cases


def pairwise(cases: Sequence[Case]) -> list[Case]:
    """A subset in which every pair of values that occurs together in the grid still does; seeded, greedy."""
    left = {pair for case in cases for pair in _pairs(case)}
    order = list(cases)
    random.Random(0).shuffle(order)
    chosen = []
    while left:
        best = max(order, key=lambda case: len(left & _pairs(case)))
        chosen.append(best)
        left -= _pairs(best)
    return chosen


def _pairs(case: Case) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    return set(itertools.combinations(sorted(dataclasses.asdict(case).items()), 2))


def compile_case(case: Case) -> Usage:
    """Compile for the architecture of the case and read the resource usage from the cubin.

    Raises:
        ResourceError: triton is missing, or set to interpret.
    """
    if not has_triton() or interpreted():
        raise ResourceError("compiling kernels needs the package triton, and TRITON_INTERPRET not set to 1")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, constants, options = _KERNELS[case.kernel](case)
    if case.kernel not in ("sparse_decode", "scan", "window_prefill"):  # as they are launched
        options["maxnreg"] = max_registers(options["num_warps"])
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        signature={name: _type_of(name, case.dtype) for name in names},
        constexprs=constants,
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in names if _is_aligned(n)},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)
    found = _resource_usage(compiled.asm["cubin"], Path(triton.__file__).parent)
    return Usage(
        registers=found["REG"],
        stack=found["STACK"],
        local=found["LOCAL"],
        shared=int(compiled.metadata.shared),
        async_copies=compiled.asm["ptx"].count("cp.async.cg"),
        threads=32 * options["num_warps"],
    )


_POINTERS = {
    "spans_ptr": "i32", "idx_ptr": "i32", "count_ptr": "i32", "budget_ptr": "i32", "gate_ptr": "i32",
    "block_ptr": "i32", "anchor_slot_ptr": "i32", "decision_ptr": "i32", "work_ptr": "i32",
    "weights_ptr": "i32", "words_ptr": "i32", "dilation_ptr": "i32", "lse_ptr": "fp32", "part_ptr": "fp32",
    "part_lse_ptr": "fp32", "tau_ptr": "fp32", "scores_ptr": "fp32", "chunk_max_ptr": "fp32",
    "chunk_sum_ptr": "fp32", "padding_ptr": "i64", "fraction_ptr": "fp64",
}  # fmt: skip


def _type_of(name: str, dtype: str) -> str:
    """Type of a kernel argument, by the naming rules of the kernels."""
    if name.isupper():
        return "constexpr"
    if name.endswith("_ptr"):
        return "*" + _POINTERS.get(name, dtype or "fp32")
    return "fp32" if name == "scale" else "i32"


def _is_aligned(name: str) -> bool:
    """Allocations and strides are multiples of 16, which vector loads and asynchronous copies rest on."""
    return name.endswith("_ptr") or name.startswith("stride_") or name in ("capacity", "max_kept")


def _resource_usage(cubin: bytes, package: Path) -> dict[str, int]:
    tool = package / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def _decode_constants(case: Case) -> tuple[dict[str, Any], dict[str, int]]:
    dtype = TORCH_DTYPES[case.dtype]
    query = torch.empty(1, case.group, 1, case.head_dim, dtype=dtype, device="meta")
    constants = DecodeConfig(*tile(case.head_dim, dtype), num_splits=8).constants(query, 1)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    return constants, options


def _sparse(case: Case) -> tuple[Any, dict[str, Any], dict[str, int]]:
    from prhs_kernels.ops.sparse_decode.triton import sparse_decode_kernel

    constants, options = _decode_constants(case)
    return sparse_decode_kernel, {**constants, "HAS_COUNT": True, "HAS_SPANS": True}, options


def _dense(case: Case) -> tuple[Any, dict[str, Any], dict[str, int]]:
    from prhs_kernels.ops.dense_decode.triton import dense_decode_kernel

    constants, options = _decode_constants(case)
    return dense_decode_kernel, {**constants, "HAS_SPANS": True}, options


def _merge(case: Case) -> tuple[Any, dict[str, Any], dict[str, int]]:
    from prhs_kernels.ops.merge_state.triton import merge_state_kernel

    padded = next_power_of_2(case.head_dim)
    return merge_state_kernel, {"HEAD_DIM": case.head_dim, "BLOCK_D": padded, "BLOCK_S": 16}, {"num_warps": 2}


def _prefill(case: Case) -> tuple[Any, dict[str, Any], dict[str, int]]:
    from prhs_kernels.ops.window_prefill.triton import window_prefill_kernel

    dtype = TORCH_DTYPES[case.dtype]
    config = prefill_config(case.head_dim, dtype, case.arch)
    constants = config.constants(torch.empty(1, 1, 1, case.head_dim, dtype=dtype, device="meta"))
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    return window_prefill_kernel, constants, options


def _gate(case: Case) -> tuple[Any, dict[str, Any], dict[str, int]]:
    from prhs_kernels.ops.retrieve.triton import gate_kernel

    constants = {
        "HEAD_DIM": case.head_dim,
        "GROUP": case.group,
        "BLOCK_G": next_power_of_2(case.group),
        "BLOCK_D": next_power_of_2(case.head_dim),
        "BLOCK": 1024,
    }
    return gate_kernel, constants, {"num_warps": 4}


def _scan(case: Case) -> tuple[Any, dict[str, Any], dict[str, int]]:
    from prhs_kernels.ops.retrieve.triton import scan_kernel

    dtype = TORCH_DTYPES[case.dtype]
    block_n, num_warps, num_stages = scan_tile(case.head_dim, dtype)
    constants = {
        "HEAD_DIM": case.head_dim,
        "GROUP": case.group,
        "BLOCK_G": max(16, next_power_of_2(case.group)),
        "BLOCK_D": next_power_of_2(case.head_dim),
        "BLOCK_N": block_n,
        "CHUNK": 512,
        "PRECISION": precision(dtype),
    }
    return scan_kernel, constants, {"num_warps": num_warps, "num_stages": num_stages}


def _weigh(case: Case) -> tuple[Any, dict[str, Any], dict[str, int]]:
    from prhs_kernels.ops.retrieve.config import weigh_blocks
    from prhs_kernels.ops.retrieve.triton import weigh_kernel

    constants = {**weigh_blocks(case.group, case.length), "CHUNK": chunk_size(case.length)}
    return weigh_kernel, {**constants, "GROUP": case.group}, {"num_warps": 4}


def _select(case: Case) -> tuple[Any, dict[str, Any], dict[str, int]]:
    from prhs_kernels.ops.retrieve.select.triton import select_kernel

    config = select_config(case.length)
    sizes = {"BLOCK": config.block, "SMALL": config.small, "PACK": config.pack}
    return select_kernel, {**sizes, "RESIDENT": config.resident}, {"num_warps": config.num_warps}


_KERNELS: dict[str, Callable[[Case], tuple[Any, dict[str, Any], dict[str, int]]]] = {
    "sparse_decode": _sparse,
    "dense_decode": _dense,
    "merge_state": _merge,
    "window_prefill": _prefill,
    "gate": _gate,
    "scan": _scan,
    "weigh": _weigh,
    "select": _select,
}


def compile_all(cases: Iterable[Case], jobs: int = 1) -> list[dict[str, Any]]:
    """A row per case: its axes, its `Usage`, and whether it spills."""
    cases = list(cases)
    with concurrent.futures.ProcessPoolExecutor(jobs) as pool:
        usages = list(pool.map(compile_case, cases))
    return [
        {**dataclasses.asdict(case), **dataclasses.asdict(usage), "spills": usage.spills}
        for case, usage in zip(cases, usages, strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile the kernels without a GPU; report their resources.")
    parser.add_argument("--pairwise", action="store_true", help="a subset with every pair of values")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--json", type=Path, help="where to write the table")
    options = parser.parse_args(arguments)
    cases = pairwise(full_grid()) if options.pairwise else full_grid()
    try:
        rows = compile_all(cases, options.jobs)
    except PrhsError as error:
        print(error, file=sys.stderr)
        return 4
    if options.json:
        import triton

        table = {"kind": "compile", "schema": 1, "conditions": {"triton": triton.__version__}, "data": rows}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join("  " + json.dumps(row) for row in rows)
        head = json.dumps({**table, "data": None}, indent=1)
        options.json.write_text(head.replace('"data": null', f'"data": [\n{lines}\n ]') + "\n", "utf-8")
    for name in _KERNELS:
        ours = [row for row in rows if row["kernel"] == name]
        registers, shared = (max(row[key] for row in ours) for key in ("registers", "shared"))
        bad = sum(row["spills"] for row in ours)
        print(f"{name:14} {len(ours):4} compiled, {bad} spill, registers <= {registers}, shared <= {shared}")
    return int(any(row["spills"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
