"""The tables of cases, one file per op."""

from __future__ import annotations

from ..case import Op
from . import (
    affine_coupling,
    autoregressive_conv,
    autoregressive_inverse,
    channel_affine,
    channel_mix,
    coupling_mix,
    dense_net,
    dequantize,
    gaussian_log_density,
    lu_compose,
    lu_layer,
    lu_linear,
    rational_quadratic_spline,
)

TABLES = (
    affine_coupling,
    channel_mix,
    coupling_mix,
    gaussian_log_density,
    dequantize,
    lu_compose,
    lu_linear,
    lu_layer,
    channel_affine,
    dense_net,
    autoregressive_conv,
    autoregressive_inverse,
    rational_quadratic_spline,
)


def tables(names: list[str] | None = None) -> list[Op]:
    """All ops, or those named. Raises ``ValueError`` for a name that is none."""
    known = [module.OP for module in TABLES]
    strange = [n for n in names or () if n not in [op.name for op in known]]
    if strange:
        raise ValueError(f"unknown op {strange[0]!r}: expected one of {', '.join(op.name for op in known)}")
    return [op for op in known if not names or op.name in names]
