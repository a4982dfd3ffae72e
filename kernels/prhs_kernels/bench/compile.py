"""Compile every kernel without a GPU and read registers, stack and shared memory from the result.

`python -m prhs_kernels.bench.compile [--pairwise] [--jobs N] [--json OUT]`; exit code 1 if a kernel spills.
Needs triton, which brings ptxas and cuobjdump.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from prhs_kernels.bench.compile_cases import COPIES, MANY_ROWS, Case, full_grid, pairwise
from prhs_kernels.errors import PrhsError, ResourceError
from prhs_kernels.ops.backend import has_triton, interpreted
from prhs_kernels.ops.decode_config import DecodeConfig, gather_registers, max_registers, next_power_of_2
from prhs_kernels.ops.launch_table import tile
from prhs_kernels.ops.retrieve.config import choose_config, scan_config, scan_registers
from prhs_kernels.ops.retrieve.key_copy import KeyCopyKind
from prhs_kernels.ops.window_prefill.config import prefill_config

ROWS = 64  # of a launch: only the vector of their lengths depends on it
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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
    # registers bounded as they are at a launch
    if case.kernel.startswith("scan"):
        if bound := scan_registers(case.kernel.partition(" ")[2] or "exact", TORCH_DTYPES[case.dtype]):
            options["maxnreg"] = bound
    elif case.kernel == "choose":
        options["maxnreg"] = 128
    elif case.kernel == "sparse_decode" and (bound := gather_registers(TORCH_DTYPES[case.dtype])):
        options["maxnreg"] = bound
    elif case.kernel in ("dense_decode", "gate", "merge_state"):
        options["maxnreg"] = max_registers(options["num_warps"])
    names = kernel.arg_names
    if "PDL" in names:
        constants["PDL"] = case.arch >= 90
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
    "padding_ptr": "i64", "fraction_ptr": "fp64",
    "chunk_sum_ptr": "fp32", "counters_ptr": "i32", "tally_ptr": "i32", "lists_ptr": "i32",
    "guess_ptr": "i32", "list_ptr": "i32", "coin_ptr": "i32",
    "codes_ptr": "u8", "data_ptr": "u8", "key_scale_ptr": "fp32", "row_scale_ptr": "fp32", "slots_ptr": "i32",
    "audit_lse_ptr": "fp32", "lse_kept_ptr": "fp32", "sums_ptr": "fp64", "units_ptr": "i64",
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
    shape = tile(case.kernel.partition(",")[0], case.head_dim, dtype, query.device, case.arch)
    shape = (shape.many or shape) if case.kernel == MANY_ROWS else shape
    config = DecodeConfig(shape.block_n, shape.num_warps, shape.num_stages, num_splits=8)
    constants = config.constants(query, 1)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    return constants, options


def _sparse(case: Case) -> tuple[Any, dict[str, Any], dict[str, int]]:
    from prhs_kernels.ops.sparse_decode.triton import sparse_decode_kernel

    constants, options = _decode_constants(case)
    early = {"EARLY": case.arch >= 90}
    return sparse_decode_kernel, {**constants, "HAS_COUNT": True, "HAS_SPANS": True, **early}, options


def _dense(case: Case) -> tuple[Any, dict[str, Any], dict[str, int]]:
    from prhs_kernels.ops.dense_decode.triton import dense_decode_kernel

    constants, options = _decode_constants(case)
    return dense_decode_kernel, {**constants, "HAS_SPANS": True}, options


def _merge(case: Case) -> tuple[Any, dict[str, Any], dict[str, int]]:
    from prhs_kernels.ops.merge_state.triton import merge_state_kernel

    padded = next_power_of_2(case.head_dim)
    return merge_state_kernel, {"HEAD_DIM": case.head_dim, "BLOCK_D": padded, "BLOCK_S": 16}, {"num_warps": 1}


def _prefill(case: Case) -> tuple[Any, dict[str, Any], dict[str, int]]:
    from prhs_kernels.ops.window_prefill.triton import window_prefill_kernel

    dtype = TORCH_DTYPES[case.dtype]
    config = prefill_config(case.head_dim, dtype, case.arch)
    constants = config.constants(torch.empty(1, 1, 1, case.head_dim, dtype=dtype, device="meta"))
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    return window_prefill_kernel, constants, options


def _gate(case: Case) -> tuple[Any, dict[str, Any], dict[str, int]]:
    from prhs_kernels.ops.retrieve.gate.triton import gate_kernel

    constants = {
        "AUDIT": True,
        "COPY": True,
        "HEAD_DIM": case.head_dim,
        "GROUP": case.group,
        "BLOCK_G": next_power_of_2(case.group),
        "BLOCK_H": next_power_of_2(case.head_dim // 2),
        "BLOCK": 1024,
    }
    return gate_kernel, constants, {"num_warps": 4}


def _scan(case: Case) -> tuple[Any, dict[str, Any], dict[str, int]]:
    from prhs_kernels.ops.retrieve.launch import scan_constants
    from prhs_kernels.ops.retrieve.triton import scan_kernel

    dtype, copy = TORCH_DTYPES[case.dtype], case.kernel.partition(" ")[2] or "exact"
    config = scan_config(case.head_dim, dtype, torch.device("meta"), copy, case.group, case.arch)
    constants = scan_constants(copy, case.head_dim, dtype, ROWS, case.group, 32768, False, config)
    return scan_kernel, constants, {name: constants.pop(name) for name in ("num_warps", "num_stages")}


def _choose(case: Case) -> tuple[Any, dict[str, Any], dict[str, int]]:
    from prhs_kernels.ops.retrieve.choose.triton import choose_kernel
    from prhs_kernels.ops.retrieve.launch import choose_constants

    config = choose_config(case.length, case.group, case.length // 32, torch.device("meta"))
    constants = choose_constants(case.group, case.length, config)
    return choose_kernel, constants, {"num_warps": constants.pop("num_warps")}


def _key_copy(case: Case) -> tuple[Any, dict[str, Any], dict[str, int]]:
    from prhs_kernels.ops.retrieve.quantise.triton import quantise_kernel

    kind = KeyCopyKind(case.kernel.removeprefix("key copy "))
    half = case.head_dim // 2
    sizes = {"HALF": half, "BLOCK_H": next_power_of_2(half), "BLOCK_N": 16}
    return quantise_kernel, {**sizes, "KIND": kind.value, "LARGEST": kind.largest}, {"num_warps": 4}


def _count_dropped(case: Case) -> tuple[Any, dict[str, Any], dict[str, int]]:
    from prhs_kernels.ops.audit.triton import count_dropped_kernel

    padded = next_power_of_2(case.group)
    sizes = {"GROUP": case.group, "BLOCK_G": padded, "BLOCK_R": 512 // padded}
    return count_dropped_kernel, {**sizes, "EXACT": True}, {"num_warps": 4}


_KERNELS: dict[str, Callable[[Case], tuple[Any, dict[str, Any], dict[str, int]]]] = {
    "sparse_decode": _sparse,
    MANY_ROWS: _sparse,
    "dense_decode": _dense,
    "merge_state": _merge,
    "window_prefill": _prefill,
    "gate": _gate,
    "scan": _scan,
    **{f"scan {copy}": _scan for copy in COPIES},
    "choose": _choose,
    **{f"key copy {copy}": _key_copy for copy in COPIES},
    "count_dropped": _count_dropped,
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
