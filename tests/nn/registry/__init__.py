"""Every layer, in the forms worth testing. A new layer is tested by being listed in one of the modules here."""

from __future__ import annotations

from thinning import one_of_each

from . import autoregressive, couplings, elementwise, flows, images, linear, spatial
from .case import Case

MODULES = (flows, couplings, autoregressive, linear, spatial, elementwise, images)
CASES = [case for module in MODULES for case in module.CASES]
_MODULE_OF = {case.name: module.__name__ for module in MODULES for case in module.CASES}


def _layer(case: Case) -> tuple[str, str]:
    """By its name: "maf" of "maf-spline-context"."""
    return _MODULE_OF[case.name], case.name.partition("-")[0]


# Of every layer the first case, the first with a context and the first with lengths; the others are exhaustive.
FIRST_CASES = list(
    one_of_each(CASES, _layer, lambda c: c.context and _layer(c), lambda c: c.lengths and _layer(c)),
)

__all__ = ["CASES", "FIRST_CASES", "Case"]
