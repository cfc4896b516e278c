"""The ops: plain functions on tensors, with gradients, fused where this machine has kernels for them."""

from ..reference.scale_map import ScaleMap
from ._library import load_cpu_module, use_backend
from .affine_coupling import affine_coupling
from .channel_mix import channel_mix
from .gaussian_log_density import gaussian_log_density

__all__ = ["ScaleMap", "affine_coupling", "channel_mix", "gaussian_log_density", "use_backend"]

load_cpu_module()
