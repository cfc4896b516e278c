"""For checks under Triton's interpreter, in the processes that ``test_interpreter.py`` starts."""

from __future__ import annotations

import math
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    torch.set_num_threads(1)
    truncating_cast = interpreter.InterpreterBuilder.cast_impl

    def rounding_cast(self, src, dst_type):
        """The interpreter truncates float32 to bfloat16 (of float64 it takes the integer part); GPUs round to even."""
        if src.dtype.scalar == tl.bfloat16 and dst_type.scalar == tl.float64:
            return truncating_cast(self, truncating_cast(self, src, tl.float32), tl.float64)
        if src.dtype.scalar not in (tl.float32, tl.float64) or dst_type.scalar != tl.bfloat16:
            return truncating_cast(self, src, dst_type)
        bits = np.ascontiguousarray(src.data.astype(np.float32)).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = np.where(np.isnan(src.data), 0x7FC0, rounded)
        return interpreter.TensorHandle(rounded.astype(np.uint16).reshape(src.data.shape), tl.bfloat16)

    interpreter.InterpreterBuilder.cast_impl = rounding_cast

    @pytest.fixture(autouse=True)
    def poisoned_outputs(monkeypatch):
        """Fresh outputs hold NaN, so that an element that no program writes shows."""
        empty_like, new_empty = torch.empty_like, torch.Tensor.new_empty

        def poison(x):
            return x.fill_(math.nan) if x.is_floating_point() else x

        monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
        monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))
