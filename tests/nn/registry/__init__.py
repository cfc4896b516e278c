"""Every layer, in the forms worth testing. A new layer is tested by being listed in one of the modules here."""

from __future__ import annotations

from . import autoregressive, couplings, elementwise, flows, images, linear, spatial
from .case import Case

MODULES = (flows, couplings, autoregressive, linear, spatial, elementwise, images)
CASES = [case for module in MODULES for case in module.CASES]

__all__ = ["CASES", "Case"]
