"""Whole flows made of the layers in :mod:`nfkernels.nn`."""

from .glow import ClassEmbedding, Glow
from .nsf import NSF
from .realnvp import ImageRealNVP, RealNVP

__all__ = ["NSF", "ClassEmbedding", "Glow", "ImageRealNVP", "RealNVP"]
