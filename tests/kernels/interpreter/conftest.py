"""A quicker interpreter for the checks, which computes the same."""

from __future__ import annotations

from typing import Any

from prhs_kernels.ops.backend import has_triton, interpreted


def patch_once() -> None:
    """Let calls of device functions patch the language only where that has not been done: triton does it anew
    in each call, which is a third of all time, and takes it back only for what a launch has patched."""
    import triton.language as tl
    from triton.runtime import interpreter

    def call(function: Any, *arguments: Any, **settings: Any) -> Any:
        if any(tl.core.is_builtin(module.load) for module in (tl, tl.core)):
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*arguments, **settings)

    if hasattr(interpreter, "_patch_lang"):  # private: another version of triton may do it another way
        interpreter.InterpretedFunction.__call__ = call


if has_triton() and interpreted():
    patch_once()
