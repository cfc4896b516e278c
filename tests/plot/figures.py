"""Tiny flows and rows, one call of every public function, and what a figure looks like."""

import numpy
import torch

from nfkernels import plot
from nfkernels.nn import Chain, Exp, Flow, LeakyReLU, Permutation, Standardize, StandardNormal


def flow_of(*layers, columns=2):
    return Flow(Chain(*layers), StandardNormal(columns)).eval()


def shifted(columns=2):
    """A normal around (1, 2, ...) with a standard deviation of 1/2."""
    return flow_of(Standardize(torch.arange(1.0, columns + 1), 0.5), columns=columns)


def bent():
    return flow_of(
        Standardize(torch.tensor([1.0, 2.0]), 0.5), LeakyReLU(0.3), Permutation(2, "reverse"), LeakyReLU(0.3)
    )


def rows(count=200, columns=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, columns, generator=generator) * 0.5 + torch.arange(1.0, columns + 1)


def pictures(count=6, shape=(1, 4, 4), levels=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(levels, (count, *shape), generator=generator, dtype=torch.uint8)


def every_picture():
    history = [{"step": k, "bpd": 3 + 1 / k} for k in range(1, 30)] + [{"step": 20, "validation_bpd": 3.2}]
    return {
        "calibration": lambda: plot.calibration(torch.arange(300)[:, None] % 101, 100),
        "change_of_variables": lambda: plot.change_of_variables(Exp()),
        "corner": lambda: plot.corner(rows(columns=3), rows(columns=3, seed=1), truth=[1.0, 2.0, 3.0]),
        "coverage": lambda: plot.coverage([0.5, 0.8, 0.95], [0.45, 0.8, 0.97], count=200),
        "density": lambda: plot.density(shifted(), data=rows(), pixels=20),
        "image_grid": lambda: plot.image_grid(pictures()),
        "interpolation": lambda: plot.interpolation(pictures(10).view(2, 5, 1, 4, 4)),
        "overview": lambda: plot.overview(bent(), rows(), pixels=20),
        "samples": lambda: plot.samples(rows(), rows(seed=1)),
        "steps": lambda: plot.steps(bent(), count=50),
        "training_curve": lambda: plot.training_curve(history, baselines={"uniform": 8.0}, best=(20, 3.2)),
        "warped_grid": lambda: plot.warped_grid(bent(), data=rows()),
    }


def drawn(figure):
    """Its pixels, uint8 ``[H, W, 3]``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return numpy.asarray(canvas.buffer_rgba())[..., :3].copy()


def texts(figure):
    """All that is written in it."""
    from matplotlib.text import Text

    return "\n".join(text.get_text() for text in figure.findobj(Text) if text.get_text())


def grey(colours):
    """Lightness L* of colours, 0 to 100."""
    from matplotlib.colors import to_rgba_array

    rgb = to_rgba_array(colours)[:, :3]
    linear = numpy.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    return 116 * numpy.where(luminance > 0.008856, numpy.cbrt(luminance), 7.787 * luminance + 16 / 116) - 16
