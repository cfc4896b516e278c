"""Counts the arithmetic of a call: every operation that reaches the dispatcher, by its formula. An op without one is an
error, so that nothing is left out silently.

A multiply-add counts 1 (4 between complex numbers), an elementwise operation 1 per element, a Fourier transform of n
points 5 n log2 n (2.5 for real data). Elements that are only copied, filled or gathered are told apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Counts:
    operations: float = 0.0
    moved: float = 0.0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.operations + other.operations, self.moved + other.moved)

    @property
    def total(self) -> float:
        return self.operations + self.moved


def count(call: Callable[[], object]) -> Counts:
    """What ``call()`` does, without gradients. Raises ``NotImplementedError`` for an operation without a formula."""
    with torch.no_grad(), _Counter() as counter:
        call()
    return counter.counts


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.counts += cost(func, args, kwargs or {}, out)
        return out


def cost(func, args: tuple, kwargs: dict[str, Any], out: Any) -> Counts:
    """One operation's counts."""
    name = func._schema.name.split("::")[1]
    own = func.namespace == "nfkernels"
    if own or name in FORMULAS:
        names = (a.name for a in func._schema.arguments)
        given = dict(zip(names, args)) | kwargs
        formula = next((f for prefix, f in OURS.items() if name.startswith(prefix)), None) if own else FORMULAS[name]
        if formula is not None:
            return Counts(operations=formula(given, out))
    elif name in FREE or _is_view(func):
        return Counts()
    elif name in MOVES:
        return Counts(moved=_elements(out))
    elif name in REDUCTIONS:
        return Counts(operations=_elements(args))
    elif torch.Tag.pointwise in func.tags or name in POINTWISE:
        return Counts(operations=max((_elements([t]) for t in _tensors((args, out))), default=0.0))
    raise NotImplementedError(f"{func} has no formula: give it one in {__file__}")


def _is_view(func) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def _tensors(values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


def _elements(values: Any) -> float:
    return float(sum(t.numel() for t in _tensors(values)))


def _weight(*tensors: Tensor) -> int:
    """Real multiply-adds of one product."""
    return 4 if all(t.is_complex() for t in tensors) else 2 if any(t.is_complex() for t in tensors) else 1


def _product(a: Tensor, b: Tensor) -> float:
    """``[.., m, k] @ [.., k, n]``: b may be a vector."""
    return float(a.numel() * (b.shape[-1] if b.dim() > 1 else 1) * _weight(a, b))


def _batched(t: Tensor, per_matrix: Callable[[int, int], float]) -> float:
    m, n = t.shape[-2:]
    return math.prod(t.shape[:-2]) * per_matrix(m, n) * _weight(t)


def _factored(t: Tensor) -> float:
    """LU factors of ``[.., n, n]``."""
    return _batched(t, lambda m, n: m * n * min(m, n) - min(m, n) ** 2 * (m + n) / 2 + min(m, n) ** 3 / 3)


def _orthogonalized(t: Tensor) -> float:
    """Householder QR with its Q, ``[.., m, n]``."""
    return _batched(t, lambda m, n: 2 * (max(m, n) * min(m, n) ** 2 - min(m, n) ** 3 / 3))


def _substituted(n: int, right: Tensor) -> float:
    return right.numel() * n / 2 * _weight(right)


def _fourier(real: bool):
    def formula(a: dict[str, Any], out: Tensor) -> float:
        whole = a["self"] if out.is_complex() else out  # not the half spectrum
        points = math.prod(whole.shape[d] for d in a["dim"])
        return (2.5 if real else 5.0) * whole.numel() * max(math.log2(points), 1.0)

    return formula


def _convolution(a: dict[str, Any], out: Tensor) -> float:
    small = a["input"] if a.get("transposed") else out
    return float(small.numel() * a["weight"][0].numel())


def _mix(a: dict[str, Any], out: Any) -> float:
    return float(a["x"].numel() * a["x"].shape[1])


FORMULAS: dict[str, Callable[[dict[str, Any], Any], float]] = {
    "mm": lambda a, out: _product(a["self"], a["mat2"]),
    "bmm": lambda a, out: _product(a["self"], a["mat2"]),
    "mv": lambda a, out: _product(a["self"], a["vec"]),
    "dot": lambda a, out: _elements([a["self"]]),
    "addmm": lambda a, out: _product(a["mat1"], a["mat2"]) + out.numel(),
    "baddbmm": lambda a, out: _product(a["batch1"], a["batch2"]) + out.numel(),
    "linalg_solve_triangular": lambda a, out: _substituted(a["self"].shape[-1], out),
    "triangular_solve": lambda a, out: _substituted(a["A"].shape[-1], out[0]),
    "_linalg_solve_ex": lambda a, out: _factored(a["A"]) + 2 * _substituted(a["A"].shape[-1], out[0]),
    "linalg_lu_factor_ex": lambda a, out: _factored(a["A"]),
    "linalg_lu": lambda a, out: _factored(a["A"]),
    "linalg_lu_solve": lambda a, out: 2 * _substituted(a["LU"].shape[-1], out),
    "linalg_inv_ex": lambda a, out: _factored(a["A"]) + 2 * _substituted(a["A"].shape[-1], out[0]),
    "_linalg_slogdet": lambda a, out: _factored(a["A"]) + _elements(out[:2]) * a["A"].shape[-1],
    "_linalg_det": lambda a, out: _factored(a["A"]) + _elements(out[:1]) * a["A"].shape[-1],
    "linalg_qr": lambda a, out: _orthogonalized(a["A"]),
    "linalg_householder_product": lambda a, out: _orthogonalized(a["input"]),
    "_fft_r2c": _fourier(real=True),
    "_fft_c2r": _fourier(real=True),
    "_fft_c2c": _fourier(real=False),
    "convolution": _convolution,
    "sort": lambda a, out: _elements(out[:1]) * max(math.log2(max(out[0].shape[-1], 2)), 1.0),
}

# Raw ops of this package. Each names its inputs; the formula is the arithmetic of the kernel, not of the reference.
OURS: dict[str, Callable[[dict[str, Any], Any], float]] = {
    "_channel_mix_forward": _mix,
    "_lu_linear_forward": _mix,  # either way two triangles of C^2 / 2
    # L U is C^3 / 3, two inverse triangles C^3 / 6 each and their product C^3 / 3.
    "_lu_compose_forward": lambda a, out: a["lower"].numel() * a["lower"].shape[-1],
    # weight [taps, C, C], forward and solved alike.
    "_autoregressive_conv_forward": lambda a, out: a["x"].numel() * a["weight"].numel() / a["x"].shape[1],
}

FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "_reshape_alias",
    "_local_scalar_dense", "scalar_tensor", "_assert_async", "_linalg_check_errors", "lift_fresh",
    "resolve_conj",
}  # fmt: skip
MOVES = {
    "copy_", "clone", "_to_copy", "contiguous", "fill_", "zero_", "zeros", "ones", "full", "zeros_like", "ones_like",
    "full_like", "new_zeros", "new_ones", "new_full", "eye", "arange", "cat", "stack", "diag_embed", "tril", "triu",
    "tril_", "triu_", "index", "index_select", "index_put_", "index_put", "gather", "scatter_", "scatter", "roll",
    "flip", "constant_pad_nd", "complex", "repeat", "randperm", "select_scatter", "slice_scatter", "diagonal_scatter",
    "linspace", "block_diag", "_conj_physical", "index_copy", "index_copy_", "_linalg_lu_unpack", "lu_unpack",
}  # fmt: skip
REDUCTIONS = {
    "sum", "mean", "prod", "amax", "amin", "max", "min", "any", "all", "argmax", "argmin", "linalg_vector_norm", "norm",
    "logsumexp", "cumsum", "equal", "var", "std", "aminmax",
}  # fmt: skip
POINTWISE = {"log_sigmoid_forward", "lerp"}
