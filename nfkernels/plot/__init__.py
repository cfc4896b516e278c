"""Pictures of flows and of what they are trained on, each a matplotlib ``Figure``.

Every function returns the figure; nothing is shown or written, and pyplot is not touched, so all of it works without a
display. `save` writes a figure as a PNG; in a notebook a figure that ends a cell is shown. What stands for different
things differs in lightness, line or marker as well as in hue, so that all pictures can be read in grey.

Needs matplotlib: ``pip install "nfkernels[plot]"``; without it every function raises ``ImportError`` with that
sentence. Rows of data that hold NaN or infinite values are left out; a ``UserWarning`` and the picture itself tell it.
"""

from .calibration import calibration, coverage
from .corner import corner
from .curves import training_curve
from .density import density
from .grid import warped_grid
from .images import image_grid, interpolation
from .overview import overview
from .points import samples
from .steps import steps
from .style import save
from .variables import change_of_variables

__all__ = [
    "calibration",
    "change_of_variables",
    "corner",
    "coverage",
    "density",
    "image_grid",
    "interpolation",
    "overview",
    "samples",
    "save",
    "steps",
    "training_curve",
    "warped_grid",
]
