"""Kernels of the decode step outside attention compile without a GPU, and none uses the stack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prhs_kernels.ops.backend import has_triton, interpreted
from prhs_kernels.ops.skinny_linear.api import PROGRAMS_PER_SM, num_splits, num_stages

pytestmark = pytest.mark.skipif(not has_triton() or interpreted(), reason="needs triton, not interpreted")

# pointers to other than the model's 16-bit type
INTEGERS = (
    "positions",
    "slots",
    "spans",
    "visible",
    "budget",
    "place",
    "gate",
    "block",
    "anchor",
    "anchor_slot",
    "decision",
    "work",
    "coin",
)
TYPES = {
    **{f"{name}_ptr": "*i32" for name in (*INTEGERS, "count", "idx")},
    **{f"{name}_ptr": "*i64" for name in ("slot", "padding", "window", "shift", "tokens")},
    **{f"{name}_ptr": "*fp64" for name in ("fraction", "ratio", "totals")},
    **{f"{name}_ptr": "*fp32" for name in ("tau", "row_scale", "squares")},
    "data_ptr": "*u8",
    **{f"{name}_ptr": "*i64" for name in ("step", "seeds")},
    "alive_ptr": "*i1",
    "eps": "fp32",
}
ROTATES = {
    "HEAD_DIM": 256, "GROUP": 16, "BLOCK_G": 32, "BLOCK_H": 128, "SPLITS": 3, "STORE_BEFORE": True,
    "BLOCK": 1024, "LARGEST": 7.0,
}  # fmt: skip
KERNELS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], dict[str, int]]] = {
    "rms_norm": (
        "rms_norm", "rms_norm_kernel",
        {"SPLITS": 4, "HAS_RESIDUAL": True, "STORE_TOTAL": True, "BLOCK": 8192},
        {"hidden_ptr": "*fp32"}, {"num_warps": 16, "maxnreg": 128},
    ),
    "start_norm": (
        "rms_norm", "start_norm_kernel", {"SPLITS": 4, "BLOCK": 512},
        {"hidden_ptr": "*fp32", "down": "fp32"}, {"num_warps": 4},
    ),
    "rope_append": (
        "rope_append", "rope_append_kernel",
        {**ROTATES, "HAS_NORM": True, "GATE": False, "AUDIT": False, "COPY": False, "KIND": "exact"},
        {"qkv_ptr": "*fp32"}, {"num_warps": 16, "maxnreg": 128},
    ),
    **{
        f"rope_append, {kind}": (
            "rope_append", "rope_append_kernel",
            {**ROTATES, "HAS_NORM": False, "GATE": True, "AUDIT": True, "COPY": True, "KIND": kind},
            {"qkv_ptr": "*fp32"}, {"num_warps": 16, "maxnreg": 128},
        )
        for kind in ("exact", "int4", "fp8")
    },
    "silu_mul": ("silu_mul", "silu_mul_kernel", {"BLOCK": 1024}, {}, {"num_warps": 4}),
    "linear_parts": (
        "skinny_linear", "linear_parts_kernel",
        {"HAS_BIAS": True, "BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 128, "CHUNKS": 4},
        {"out_ptr": "*fp32", "down": "fp32"}, {"num_warps": 4, "num_stages": 4},
    ),
    **{
        f"gated_linear, {stages} stages": (
            "skinny_linear", "gated_linear_kernel",
            {"HAS_BIAS": False, "BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 128, "CHUNKS": 8},
            {"down": "fp32"}, {"num_warps": 4, "num_stages": stages},
        )
        for stages in (3, 4)
    },
    "largest": (
        "next_token", "largest_kernel", {"BLOCK": 2048}, {"best_ptr": "*fp32", "place_ptr": "*i32"},
        {"num_warps": 4},
    ),
    "next_token": (
        "next_token", "next_token_kernel", {"COUNTS": True, "BLOCK_P": 64, "BLOCK_S": 4},
        {"best_ptr": "*fp32", "token_ptr": "*i64", "drawn_ptr": "*i64", "stop_ptr": "*i64"}, {"num_warps": 1},
    ),
    "draw_coins": ("audit", "draw_coins_kernel", {"BLOCK": 128}, {}, {"num_warps": 1}),
    **{
        f"scan_units, {head_dim}, {precision}": (
            "audit", "scan_units_kernel",
            {
                "HEAD_DIM": head_dim, "GROUP": 4, "BLOCK_G": 4, "BLOCK_D": head_dim, "BLOCK_N": block_n,
                "BLOCK_R": 512, "BLOCK_S": 256, "PIECES": 133, "HAS_COUNT": True, "PRECISION": precision,
                "LANES": min(4, block_n // 16),
            },
            {"part_ptr": "*fp32", "lse_ptr": "*fp32", "scale": "fp32", "counters_ptr": "*i32"}
            | ({} if precision == "tf32" else {"q_ptr": "*fp32", "k_ptr": "*fp32"}),
            {"num_warps": warps, "num_stages": stages} | ({"maxnreg": 255} if precision == "ieee" else {}),
        )
        for head_dim, precision, block_n, warps, stages in (
            (64, "tf32", 64, 4, 4), (128, "tf32", 64, 4, 4), (256, "tf32", 32, 4, 4),
            (128, "ieee", 16, 8, 2), (256, "ieee", 16, 4, 2),
        )
    },
    "step_plan": ("step_plan", "step_plan_kernel", {"BLOCK_H": 8}, {}, {"num_warps": 1}),
    "step_count": ("step_count", "step_count_kernel", {"HAS_SETS": True, "BLOCK_H": 8}, {}, {"num_warps": 1}),
}  # fmt: skip


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("name", KERNELS)
def test_it_compiles_without_spilling(name: str, arch: int) -> None:
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from prhs_kernels.bench.compile import _resource_usage

    folder, function, constants, types, options = KERNELS[name]
    kernel = getattr(importlib.import_module(f"prhs_kernels.ops.{folder}.triton"), function)
    names = kernel.arg_names
    if "PDL" in names:
        constants = {**constants, "PDL": arch >= 90}
        options = {**options, "launch_pdl": arch >= 90}

    def kind(argument: str) -> str:
        if argument.isupper():
            return "constexpr"
        default = "*bf16" if argument.endswith("_ptr") else "i32"
        return types.get(argument, TYPES.get(argument, default))

    whole = ("size", "width", "per_split")
    aligned = [n for n in names if n.endswith("_ptr") or n.startswith("stride_k") or n in whole]
    source = ASTSource(
        kernel,
        signature={argument: kind(argument) for argument in names},
        constexprs=constants,
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage = _resource_usage(compiled.asm["cubin"], Path(triton.__file__).parent)
    assert usage["STACK"] == usage["LOCAL"] == 0, usage
    assert ("griddepcontrol.wait" in compiled.asm["ptx"]) == ("PDL" in names and arch >= 90)
    if folder == "skinny_linear":
        together = PROGRAMS_PER_SM[options["num_stages"]]
        assert (compiled.metadata.shared + 1024) * together <= 228 * 1024, "programs that fit on an SM"
        assert "cp.async.cg" in compiled.asm["ptx"]


@pytest.mark.parametrize(
    ("size", "width", "splits"),
    [(6144, 4096, 2), (12288, 4096, 1), (4096, 4096, 4), (4096, 14336, 4), (4096, 11008, 4), (640, 1280, 10)],
)
def test_projections_fill_the_device(size: int, width: int, splits: int) -> None:
    """QKV, output and down projection of Llama-3-8B and LLaMA-2-7B, and a small one, on 132 SMs."""
    assert num_splits(size // 64, width, 132) == splits


def test_all_programs_run_at_once_where_they_can() -> None:
    """Gate and up of Llama-3-8B, of LLaMA-2-7B, of a rank of Llama-3-70B, and of Qwen2.5-7B: too many."""
    assert [num_stages(2 * ffn // 64, 132) for ffn in (14336, 11008, 3584, 18944)] == [4, 3, 4, 4]


@pytest.mark.parametrize("sms", [1, 2, 108, 148])
def test_no_split_is_left_without_a_block(sms: int) -> None:
    for tiles in (1, 5, 64, 1000):
        for blocks in (1, 3, 32, 86):
            splits = num_splits(tiles, 128 * blocks, sms)
            assert 1 <= splits <= blocks and (splits - 1) * -(-blocks // splits) < blocks
