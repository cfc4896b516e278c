"""Whole flows made of the layers in :mod:`nfkernels.nn`."""

from .glow import ClassEmbedding, Glow

__all__ = ["ClassEmbedding", "Glow"]
