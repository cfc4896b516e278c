"""Glow: a multi-scale image flow (Kingma & Dhariwal 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..nn.bases import StandardNormal
from ..nn.bijection import Bijection, Chain, reads_values
from ..nn.config import Recorded
from ..nn.conv_net import Dropout
from ..nn.glow_steps import GlowSteps
from ..nn.image_flow import ImageFlow
from ..nn.multi_scale import MultiScale
from ..nn.reversible import Memory
from ..nn.split_prior import DiagonalPrior, SplitPrior
from ..nn.squeeze import Squeeze
from ..nn.standardize import Standardize
from ..nn.variational_dequantization import VariationalDequantization
from ..ops import ScaleMap
from ..ops.affine_coupling import OrderName

Dequantization = Literal["uniform", "variational"]
DEQUANTIZER_WIDTHS = (16, 64)  # a quarter of the flow's own, within these


class Glow(ImageFlow):
    """Glow over uint8 images ``[B, C, H, W]``: per level a squeeze, ``steps`` steps of flow, and a learned prior.

    Args:
        shape: ``(channels, height, width)``; height and width must be multiples of ``2 ** levels``.
        levels: L. After each but the last, half of the channels leave through a :class:`SplitPrior`.
        steps: K per level, or one number for each level.
        hidden: width of the coupling networks.
        classes: number of classes of a class-conditional model, whose context is then labels, int64 ``[B]``. Their
            embedding (``class_width`` numbers each) shifts the first layer of every network and the priors.
        grey_levels: values a pixel can take; see :class:`ImageFlow`.
        dequantization: how images become continuous: ``"uniform"``, or ``"variational"``, by a
            :class:`VariationalDequantization` that learns with the flow, starts out uniform and does not see the class
            (4 couplings, of width ``hidden // 4`` but at least 16 and at most 64).
        dropout, dropout_of, kernel, last_kernel: of the coupling networks; see :class:`ConvConditioner`.
        scale_map, order: of the couplings; see :func:`nfkernels.affine_coupling`.
        memory: what training keeps: ``"stored"`` all activations, ``"reversible"`` each level's output; see
            :class:`nfkernels.nn.GlowSteps`.

    ``forward`` returns flat latents ``z [B, D]`` that follow N(0, I); :meth:`split_latent` gives them by level.

    Raises ``ValueError`` for sizes that cannot be squeezed, and for labels that are missing or out of range (the
    latter on the CPU only). Reference: Kingma & Dhariwal 2018, figure 2 and table 1.
    """

    bijection: Chain

    def __init__(
        self,
        shape: Sequence[int],
        *,
        levels: int = 2,
        steps: int | Sequence[int] = 8,
        hidden: int = 64,
        classes: int | None = None,
        grey_levels: int = 256,
        dropout: float = 0.0,
        dropout_of: Dropout = "element",
        kernel: int = 3,
        last_kernel: int | None = None,
        scale_map: ScaleMap | str = "glow",
        order: OrderName = "shift_first",
        class_width: int = 32,
        memory: Memory = "stored",
        dequantization: Dequantization = "uniform",
    ) -> None:
        channels, height, width = _checked_shape(shape, levels)
        counts = [steps] * levels if isinstance(steps, int) else list(steps)
        if len(counts) != levels:
            raise ValueError(f"steps must be one number or one per level: got {len(counts)} for {levels} levels")
        if dequantization not in get_args(Dequantization):
            raise ValueError(f"unknown dequantization {dequantization!r}: expected 'uniform' or 'variational'")
        context = 0 if classes is None else class_width
        parts: list[Bijection] = []
        shapes = []
        for level, count in enumerate(counts):
            channels, height, width = channels * 4, height // 2, width // 2
            shapes.append((channels, height, width))
            flow = GlowSteps(
                channels, count, hidden, context_channels=context, kernel=kernel, last_kernel=last_kernel,
                dropout=dropout, dropout_of=dropout_of, scale_map=scale_map, order=order,
                memory=memory,
            )  # fmt: skip
            last = level == levels - 1
            prior = DiagonalPrior if last else SplitPrior
            parts.append(Chain(Squeeze(2), flow, prior(channels, context_channels=context)))
            if not last:
                channels -= channels // 2
        dequantizer = None
        if dequantization == "variational":
            narrowest, widest = DEQUANTIZER_WIDTHS
            dequantizer = VariationalDequantization(shape, hidden=min(max(hidden // 4, narrowest), widest))
        # x in [0, 1) is centred; ActNorm brings it to scale.
        super().__init__(
            Chain(Standardize(0.5, 1.0), MultiScale(parts, shapes)),
            StandardNormal(int(torch.Size(shape).numel())),
            shape,
            grey_levels=grey_levels,
            embed=None if classes is None else ClassEmbedding(classes, class_width),
            dequantizer=dequantizer,
        )
        self.classes = classes

    def split_latent(self, z: Tensor) -> list[Tensor]:
        """The latents of every level, finest first, each ``[B, c, h, w]`` (views of ``z [B, D]``)."""
        levels: Any = self.bijection[1]
        return levels.split(z)

    def _matched(self, context: Tensor | None, like: Tensor) -> Tensor | None:
        if self.classes is None and context is not None:
            raise ValueError("this Glow was built without classes: it takes no context")
        return super()._matched(context, like)


class ClassEmbedding(Recorded, nn.Module):
    """Labels, integers ``[B]``, to learned vectors ``[B, width]``.

    Raises ``ValueError`` for labels that are missing, of another shape or type, or (on the CPU) out of range.
    """

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        if classes < 1:
            raise ValueError(f"classes must be at least 1, got {classes}")
        self.classes = classes
        self.table = nn.Parameter(torch.randn(classes, width))

    def forward(self, labels: Tensor | None) -> Tensor:
        """``[B] -> [B, width]``."""
        if labels is None:
            raise ValueError(f"this flow was built with {self.classes} classes: give the labels as context=")
        if labels.dim() != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"labels must be integers [B], got {labels.dtype} {tuple(labels.shape)}")
        if reads_values(labels) and labels.numel():
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.classes:
                wrong = low if low < 0 else high
                raise ValueError(f"label {wrong} is out of range: this flow has classes 0 to {self.classes - 1}")
        return nn.functional.embedding(labels.long(), self.table)


def _checked_shape(shape: Sequence[int], levels: int) -> tuple[int, int, int]:
    if len(shape) != 3 or any(n < 1 for n in shape):
        raise ValueError(f"an image's shape is (channels, height, width), got {tuple(shape)}")
    if levels < 1:
        raise ValueError(f"a Glow needs at least 1 level, got {levels}")
    channels, height, width = shape
    factor = 2**levels
    if height % factor or width % factor:
        raise ValueError(
            f"images of {height} x {width} cannot be squeezed {levels} times: with levels={levels} both sides must be "
            f"multiples of {factor}, for example {_nearest(height, factor)} x {_nearest(width, factor)}"
        )
    return channels, height, width


def _nearest(n: int, factor: int) -> int:
    return max(1, round(n / factor)) * factor
