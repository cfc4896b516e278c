"""Is this flow right? Calibration of posteriors, log evidence, outlier scores, and which layer is to blame.

Everything here looks at a flow that exists already and leaves it as it is. Each name is imported at first use; they are
listed in ``__init__.pyi``.
"""

from .._lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
