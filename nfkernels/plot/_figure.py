"""The figures that are returned. Imported once something is drawn, as it needs matplotlib."""

from __future__ import annotations

import io

from matplotlib.figure import Figure

from .style import drawing


class NotebookFigure(Figure):
    """A ``Figure`` that a notebook shows by itself: matplotlib's own are shown only once pyplot is there."""

    @drawing()
    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.savefig(picture, format="png", dpi="figure")
        return picture.getvalue()
