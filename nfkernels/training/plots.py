"""Pictures of a run: the loss curve (matplotlib) and a grid of images (Pillow). Both are imported only here."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .._atomic import atomic_write
from .data.image_data import need

_GRID_PIXELS = 640  # small images are enlarged by whole factors until the grid is about this large


def loss_curve(
    path: str | os.PathLike[str],
    history: Iterable[dict[str, Any]],
    *,
    unit: str = "bits/dim",
    baselines: dict[str, float] | None = None,
    best: tuple[int, float] | None = None,
    title: str | None = None,
) -> None:
    """Draws training and validation loss over steps as a PNG, written atomically.

    Args:
        path: of the picture.
        history: entries of ``metrics.jsonl``.
        unit: of the losses, at the axis.
        baselines: names and losses of other models, as horizontal lines.
        best: step and validation loss of the weights that were kept, as a dot.
        title: above the picture.

    Raises:
        DataError: matplotlib is not installed. OSError: the file cannot be written.
    """
    need("matplotlib", "drawing the loss curve")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    history = list(history)
    key = "bpd" if unit == "bits/dim" else "nll"

    def points(name: str) -> list[tuple[int, float]]:  # a file that somebody has edited may hold anything
        return [(e["step"], e[name]) for e in history if isinstance(e.get(name), (int, float))]

    train, held_out = points(key), points(f"validation_{key}")

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train, strict=True), color="#9ecae1", linewidth=1.2, label="training")
    if held_out:
        axes.plot(
            *zip(*held_out, strict=True), color="#08519c", linewidth=1.8, marker="o", markersize=3, label="validation"
        )
    if best is not None:
        label = f"kept: {best[1]:.3f} at step {best[0]}"
        axes.plot(*best, color="#d94801", marker="o", markersize=7, linestyle="none", label=label, zorder=3)
    # The first steps, and models that know nothing, are off any scale that shows the rest.
    bottom, top = _range([loss for _, loss in train], [loss for _, loss in held_out], (baselines or {}).values())
    axes.set_ylim(bottom, top)
    for index, (name, loss) in enumerate((baselines or {}).items()):
        label = f"{name}: {loss:.3f}" + (" (above)" if loss > top else "")
        axes.axhline(loss, color="0.45", linewidth=1, linestyle=("--", ":", "-.")[index % 3], label=label)
    axes.set_xlim(left=0)
    axes.set_xlabel("step")
    axes.set_ylabel("bits per dimension" if unit == "bits/dim" else unit)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)
    if title:
        axes.set_title(title, fontsize=11, parse_math=False)  # a name in it may hold dollars
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def _range(train: list[float], held_out: list[float], baselines: Iterable[float]) -> tuple[float, float]:
    """What to show of the losses: all of the validation, the training after its first 6 %, the nearest baseline."""
    settled = train[len(train) // 16 :]
    shown = [*settled, *held_out, *sorted(baselines)[:1]] or [0.0, 1.0]
    span = max(max(shown) - min(shown), 1e-3)
    return min(shown) - 0.06 * span, max(shown) + 0.06 * span


def image_grid(
    path: str | os.PathLike[str], images: Tensor, *, grey_levels: int = 256, columns: int | None = None
) -> None:
    """Writes uint8 images `[N, C, H, W]` side by side as a PNG, atomically: RGB of three channels or more, else grey.

    Of two channels the first is drawn, of more than three the first three.
    Values 0 .. grey_levels - 1 become black .. white; small images are enlarged by a whole factor. ``columns`` is by
    default such that the grid is about square.

    Raises:
        DataError: Pillow is not installed. ValueError: images of another shape. OSError: the file cannot be written.
    """
    pillow = need("PIL.Image", "writing pictures")
    if images.dim() != 4 or not images.numel():
        raise ValueError(f"images are {list(images.shape)}: expected [N, C, H, W], none of them 0")
    images = images[:, : 3 if images.shape[1] >= 3 else 1]
    count, depth, height, width = images.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    factor = max(1, round(_GRID_PIXELS / max(columns * width, rows * height)))
    gap = 2 if factor > 1 else 1
    large = images.cpu().float().mul_(255 / max(grey_levels - 1, 1)).round_().clamp_(0, 255).byte()
    large = large.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    height, width = height * factor + gap, width * factor + gap
    grid = large.new_full((depth, rows * height + gap, columns * width + gap), 255)
    for index, image in enumerate(large):
        top, left = gap + index // columns * height, gap + index % columns * width
        grid[:, top : top + height - gap, left : left + width - gap] = image
    data = grid.permute(1, 2, 0).contiguous()
    size = (grid.shape[2], grid.shape[1])
    picture = pillow.frombytes("RGB" if depth == 3 else "L", size, data.numpy().tobytes())
    with atomic_write(path) as temporary:
        picture.save(temporary, format="PNG")
