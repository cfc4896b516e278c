"""`nfkernels demo change-of-variables`: what happens to a density when its variable is put through a function."""

from __future__ import annotations

import math
import sys

from ... import plot
from ...plot.variables import SCALE, SHIFT, Lecture, die, lecture, lecture_figure
from ..as_json import print_json
from ..progress import unread_is_fine
from .folder import SOFTWARE, PictureFolder
from .options import VARIABLES


def change_of_variables(folder: PictureFolder, *, json: bool = False) -> int:
    """Draws the four cases into the folder's picture and explains them on the terminal, or in JSON. Returns 0."""
    cases = lecture()
    plot.save(lecture_figure(cases), folder.pictures[0], software=SOFTWARE)
    if json:
        errors = {"exp_log_density_error": cases.exp.error, "affine_log_density_error": cases.affine.error}
        share = {"share_without_logarithm": cases.refused.share}
        print_json({"name": VARIABLES, **errors, **share, "written": folder.pictures})
        return 0
    with unread_is_fine(sys.stdout):
        print(explanation(cases) + f"\n\n{folder.told()}", flush=True)
    return 0


def explanation(cases: Lecture) -> str:
    exp, affine, refused = cases
    squares, each = ", ".join(map(str, die())), die()[36]
    mean, spread = exp.drawn.mean().item(), affine.drawn.std().item()
    return f"""\
What becomes of the density of x in y = f(x)?

1. A die, y = x^2: the values move to {squares}, and each keeps its {each}. Probabilities have no
   width that f could stretch, so its derivative does not matter.
2. A normal, y = exp(x): a density is probability per length, and f changes lengths, so p(y) = p(x) / |f'(x)|. Here
   that is p(ln y) / y, the log-normal. Mean of {len(exp.drawn):,} samples {mean:.3f}, expected {math.exp(0.5):.3f};
   log p(y) by nfkernels.nn.Exp and by the formula differ by {exp.error:.0e} at most.
3. A normal, y = {SHIFT:g} + {SCALE:g} x: all lengths become {SCALE:g} of what they were, so the density grows by \
{1 / SCALE:g} to a normal again.
   Standard deviation of the samples {spread:.3f}, expected {SCALE:.3f};
   log p(y) by nfkernels.nn.Affine and by the formula differ by {affine.error:.0e} at most.
4. A normal, y = ln(x): no. {100 * refused.share:.1f} % of the samples are negative and have no logarithm; f has to be \
defined wherever
   x has density. nfkernels.nn.Log says:
   {refused.sentence}"""
