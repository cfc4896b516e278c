"""The ops: plain functions on tensors, with gradients, fused where this machine has kernels for them."""

from ..reference.scale_map import ScaleMap
from ..reference.spline import Spline
from ._library import load_cpu_module, use_backend
from .affine_coupling import affine_coupling, affine_coupling_from_output
from .autoregressive_conv import autoregressive_conv
from .autoregressive_inverse import Degrees, autoregressive_inverse
from .channel_affine import channel_affine
from .channel_mix import channel_mix, channel_mix_from_output
from .coupling_mix import ConditionerInput, coupling_mix
from .dense_net import dense_net
from .dequantize import dequantize
from .gaussian_log_density import gaussian_log_density
from .lu_compose import LUMatrices, lu_compose
from .lu_layer import lu_layer
from .lu_linear import lu_linear
from .philox_uniform import advance_, philox_uniform, random_key
from .rational_quadratic_spline import rational_quadratic_spline

__all__ = [
    "ConditionerInput",
    "Degrees",
    "LUMatrices",
    "ScaleMap",
    "Spline",
    "advance_",
    "affine_coupling",
    "affine_coupling_from_output",
    "autoregressive_conv",
    "autoregressive_inverse",
    "channel_affine",
    "channel_mix",
    "channel_mix_from_output",
    "coupling_mix",
    "dense_net",
    "dequantize",
    "gaussian_log_density",
    "lu_compose",
    "lu_layer",
    "lu_linear",
    "philox_uniform",
    "random_key",
    "rational_quadratic_spline",
    "use_backend",
]

load_cpu_module()
