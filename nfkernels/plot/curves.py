"""How a training went."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from . import style
from ._rows import array, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = list[tuple[int, float]]


@style.drawing()
def training_curve(
    history: Iterable[dict[str, Any]],
    *,
    unit: str = "bits/dim",
    baselines: dict[str, float] | None = None,
    best: tuple[int, float] | None = None,
    title: str | None = None,
) -> Figure:
    """Training and validation loss over steps.

    Shown are all of the validation, the training after its first 6 % and the nearest baseline: the first steps, and
    models that know nothing, are off any scale that shows the rest. Losses that are not finite are crosses on the axis.

    Args:
        history: ``FitResult.history``, or the entries of a run's ``metrics.jsonl``: ``step`` with ``bpd`` or ``nll``,
            or with ``validation_bpd`` or ``validation_nll``, each a number of Python or NumPy or a tensor of one.
            What an entry holds beside is ignored.
        unit: of the losses, ``FitResult.unit``, or a text for the axis: ``"bits/dim"`` draws ``bpd``, anything else
            ``nll``.
        baselines: names and losses of other models, as horizontal lines.
        best: step and validation loss of the weights that were kept, as a dot.
        title: above the picture.

    Raises:
        ValueError: a history of losses in the other unit.
        ImportError: no matplotlib.
    """
    entries = list(history)
    key = "bpd" if unit == "bits/dim" else "nll"
    other = "nll" if key == "bpd" else "bpd"
    train, held_out = _points(entries, key), _points(entries, f"validation_{key}")
    if not train and not held_out and (_points(entries, other) or _points(entries, f"validation_{other}")):
        raise ValueError(f"history holds losses as {other}, and unit={unit!r} is for {key}: pass its own unit")

    made = style.figure(7, 4.2)
    axes = made.subplots()
    looks: tuple[tuple[Any, dict[str, Any]], ...] = (
        (train, {"color": style.SKY, "linewidth": 1.2, "label": "training"}),
        (held_out, {"color": style.BLUE, "linewidth": 1.8, "marker": "o", "markersize": 3, "label": "validation"}),
    )
    for points, look in looks:
        if points:
            axes.plot(*zip(*points, strict=True), **look)
    if best is not None:
        label = f"kept: {best[1]:.3f} at step {best[0]}"
        axes.plot(*best, color=style.ORANGE, marker="D", markersize=7, linestyle="none", label=label, zorder=3)
    known = {name: float(loss) for name, loss in (baselines or {}).items()}
    bottom, top = _range([loss for _, loss in train], [loss for _, loss in held_out], known.values())
    axes.set_ylim(bottom, top)
    for index, (name, loss) in enumerate(known.items()):
        label = f"{style.in_legend(name, 3)}: {loss:.3f}" + (" (above)" if loss > top else "")
        axes.axhline(loss, color="0.45", linewidth=1, linestyle=("--", ":", "-.")[index % 3], label=label)
    lost = [step for points in (train, held_out) for step, loss in points if not math.isfinite(loss)]
    if lost:
        axes.plot(lost, [bottom] * len(lost), "x", color=style.RED, clip_on=False, label=f"not finite: {len(lost)}")
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", integer=True)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.set_xlabel("step")
    axes.set_ylabel("bits per dimension" if unit == "bits/dim" else unit, parse_math=False)
    axes.grid()
    if axes.get_legend_handles_labels()[0]:
        style.verbatim(axes.legend())
    if title:
        axes.set_title(style.wrapped(title, 6, 11), parse_math=False)  # a name in it may hold dollars
    return made


def _points(entries: list[dict[str, Any]], name: str) -> Points:
    """Steps and losses; what was not finite is None in a file. A file that somebody has edited may hold anything."""
    found = [(_step(entry.get("step")), _loss(entry.get(name, ""))) for entry in entries]
    return [(step, loss) for step, loss in found if step is not None and loss is not None]


def _step(value: Any) -> int | None:
    try:
        return operator.index(value)
    except TypeError:
        return None


def _loss(value: Any) -> float | None:
    """NaN for None; None for what is no number."""
    if value is None:
        return math.nan
    if isinstance(value, str):
        return None
    try:
        found = array(value)
    except (TypeError, ValueError):
        return None
    return float(found.item()) if found.size == 1 else None


def _range(train: list[float], held_out: list[float], baselines: Iterable[float]) -> tuple[float, float]:
    nearest = sorted(baselines)
    shown = [*train[len(train) // 16 :], *held_out]
    shown += nearest[:1] if shown else nearest
    shown = [loss for loss in shown if math.isfinite(loss)] or [0.0, 1.0]
    low, high = min(shown), max(shown)
    return spread(low, max(high, low + 1e-3) if high > low else high, 0.06)
