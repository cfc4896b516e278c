"""nfkernels: fused CUDA, Triton and C++ kernels for normalizing flows in PyTorch."""

from . import models, nn, ops
from ._version import __version__
from .ops import ScaleMap, affine_coupling, channel_mix, use_backend

__all__ = ["ScaleMap", "__version__", "affine_coupling", "channel_mix", "models", "nn", "ops", "use_backend"]
