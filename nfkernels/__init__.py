"""nfkernels: fused CUDA, Triton and C++ kernels for normalizing flows in PyTorch.

Everything is imported at first use: the command line answers without waiting for torch. ``import nfkernels.ops``
registers the ops with PyTorch by itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from . import integrations, models, nn, ops, training
    from .integrations import accelerate, restore
    from .models import IAF, MAF, NSF, Glow, RealNVP
    from .nn import load
    from .ops import (
        ConditionerInput,
        Degrees,
        LUMatrices,
        ScaleMap,
        Spline,
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
        use_backend,
    )

_MODULES = ("integrations", "models", "nn", "ops", "training")
_HOMES = {
    "ConditionerInput": "ops",
    "Degrees": "ops",
    "Glow": "models",
    "IAF": "models",
    "LUMatrices": "ops",
    "MAF": "models",
    "NSF": "models",
    "RealNVP": "models",
    "ScaleMap": "ops",
    "Spline": "ops",
    "accelerate": "integrations",
    "affine_coupling": "ops",
    "autoregressive_conv": "ops",
    "autoregressive_inverse": "ops",
    "channel_affine": "ops",
    "channel_mix": "ops",
    "coupling_mix": "ops",
    "dense_net": "ops",
    "dequantize": "ops",
    "gaussian_log_density": "ops",
    "load": "nn",
    "lu_compose": "ops",
    "lu_layer": "ops",
    "lu_linear": "ops",
    "rational_quadratic_spline": "ops",
    "restore": "integrations",
    "use_backend": "ops",
}
__all__ = [
    "IAF",
    "MAF",
    "NSF",
    "ConditionerInput",
    "Degrees",
    "Glow",
    "LUMatrices",
    "RealNVP",
    "ScaleMap",
    "Spline",
    "__version__",
    "accelerate",
    "affine_coupling",
    "autoregressive_conv",
    "autoregressive_inverse",
    "channel_affine",
    "channel_mix",
    "coupling_mix",
    "dense_net",
    "dequantize",
    "gaussian_log_density",
    "integrations",
    "load",
    "lu_compose",
    "lu_layer",
    "lu_linear",
    "models",
    "nn",
    "ops",
    "rational_quadratic_spline",
    "restore",
    "training",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOMES:
        value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
