"""Whole flows made of the layers in :mod:`nfkernels.nn`."""

from .glow import ClassEmbedding, Glow
from .maf import IAF, MAF
from .nsf import NSF
from .realnvp import ImageRealNVP, RealNVP

__all__ = ["IAF", "MAF", "NSF", "ClassEmbedding", "Glow", "ImageRealNVP", "RealNVP"]
