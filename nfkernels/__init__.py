"""nfkernels: fused CUDA, Triton and C++ kernels for normalizing flows in PyTorch.

Everything is imported at first use: the command line answers without waiting for torch. ``import nfkernels.ops``
registers the ops with PyTorch by itself. The names are listed in ``__init__.pyi``.
"""

from ._lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
