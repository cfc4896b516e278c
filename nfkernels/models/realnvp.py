"""RealNVP: affine couplings, over the columns of a table and over images (Dinh et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..nn import masks
from ..nn.actnorm import ActNorm
from ..nn.bases import Base, StandardNormal
from ..nn.bijection import Bijection, Chain
from ..nn.conditioners import Activation, ConvConditioner
from ..nn.conv_residual_net import ConvResidualNet
from ..nn.coupling import AffineCoupling
from ..nn.elementwise import Logit
from ..nn.flow import Flow
from ..nn.image_flow import ImageFlow
from ..nn.multi_scale import MultiScale
from ..nn.squeeze import Squeeze
from ..ops import ScaleMap
from .tables import Linear, Mask, Network, base_over, check_choice, check_table, coupling_masks, make_network, mixing

ConvNetwork = Literal["conv", "residual"]


class RealNVP(Flow):
    """Affine couplings over the columns of a table ``[B, D]``, D at least 2. ``RealNVP(shape=(C, H, W), image=True)``
    gives the flow over images, an :class:`ImageRealNVP`.

    Args:
        features: D.
        layers: couplings, which transform ``mask``'s columns and the others in turn: ``"alternating"`` ones,
            ``"halves"`` or ``"random"`` halves.
        hidden, depth: width and hidden layers (blocks, of a residual network) of the couplings' networks.
        context: width E of a context ``[B, E]`` that the networks are given: a conditional density.
        embed: network applied to the context first, of output width ``context``: for labels an
            ``nn.Embedding(classes, context)``.
        scale_map: of the couplings; see :func:`nfkernels.affine_coupling`. The default, ``"realnvp"``, is
            ``log s = g tanh(r)`` with a learned g per column.
        linear: between the couplings: ``"none"``, ``"lu"`` (a random permutation and an :class:`LULinear`) or
            ``"permutation"``.
        network, activation, dropout: of the conditioners; ``"mlp"`` or ``"residual"``.
        actnorm: an :class:`ActNorm` between the couplings.
        base: any base over ``(D,)``; N(0, I) by default.

    Every coupling starts as the identity. Raises ``ValueError`` for options that do not fit each other.
    Reference: Dinh et al. 2017, section 3.
    """

    def __new__(cls, *args: Any, image: bool = False, shape: Sequence[int] | None = None, **options: Any) -> Any:
        if not image:
            return super().__new__(cls)
        if shape is not None and args:
            raise ValueError(f"RealNVP(image=True) takes one shape, got {args[0]} and shape={tuple(shape)}")
        return ImageRealNVP(*(args if shape is None else (shape,)), **options)

    def __init__(
        self,
        features: int | None = None,
        *,
        image: Literal[False] = False,
        shape: None = None,
        layers: int = 8,
        hidden: int = 64,
        depth: int = 2,
        context: int = 0,
        embed: nn.Module | None = None,
        scale_map: ScaleMap | str = "realnvp",
        linear: Linear = "none",
        mask: Mask = "alternating",
        network: Network = "mlp",
        activation: Activation = "relu",
        dropout: float = 0.0,
        actnorm: bool = False,
        base: Base | None = None,
    ) -> None:
        if features is None or shape is not None:
            given = "neither" if shape is None else f"shape={tuple(shape)}"
            raise ValueError(f"RealNVP takes the number of features, or shape= with image=True: got {given}")
        check_table(features, layers, hidden, context, embed, "RealNVP")
        if features == 1:
            raise ValueError(
                "RealNVP couples columns to each other, and one column has no other: use NSF(1), or give 2 features"
            )
        scale_map = ScaleMap.parse(scale_map)
        parts: list[Bijection] = []
        for i, transformed in enumerate(coupling_masks(mask, features, layers)):
            if i:
                parts += [*([ActNorm(features)] if actnorm else []), *mixing(linear, features)]
            count = int(transformed.sum())
            net = make_network(
                network, features - count, hidden, (2 if scale_map.has_scale else 1) * count, depth=depth,
                context=context, activation=activation, dropout=dropout,
            )  # fmt: skip
            gain = scale_map.kind == "tanh"
            parts.append(AffineCoupling(net, scale_map=scale_map, mask=transformed, learned_gain=gain))
        super().__init__(Chain(parts), base_over(features, base), embed=embed)
        self.features = features
        self.event_shape = torch.Size((features,))


class ImageRealNVP(ImageFlow):
    """RealNVP over uint8 images ``[B, C, H, W]``: per level couplings by checkerboards, a squeeze, couplings by halves
    of the channels, and half of the channels leave; on the last level one more by checkerboards, and no squeeze.

    Args:
        shape: ``(channels, height, width)``; height and width must be multiples of ``2 ** (levels - 1)``, and leave at
            least two pixels for the last checkerboards.
        levels: scales. couplings: of either kind per level (one more on the last).
        network: of the couplings: ``"conv"`` (:class:`ConvConditioner`, three convolutions) or ``"residual"``
            (:class:`ConvResidualNet`, as in the paper, of ``depth`` blocks); hidden, dropout: see there.
        context: width E of a context ``[B, E]`` (or ``[B, E, H', W']``) that the networks are given.
        embed: network applied to the context first, of output width ``context``: for labels an
            ``nn.Embedding(classes, context)``.
        alpha: the couplings act on ``logit(alpha + (1 - 2 alpha) x)`` of the dequantised x in ``[0, 1)``.
        scale_map: of the couplings; see :class:`RealNVP`.
        actnorm: an :class:`ActNorm` after every coupling, where the paper has batch normalisation.
        grey_levels: values a pixel can take; see :class:`ImageFlow`.

    ``forward`` returns flat latents ``z [B, D]`` that follow N(0, I); :meth:`split_latent` gives them by level.
    Raises ``ValueError`` for sizes that cannot be squeezed. Reference: Dinh et al. 2017, sections 3.4 to 3.6 and 4.1.
    """

    bijection: Chain

    def __init__(
        self,
        shape: Sequence[int],
        *,
        levels: int = 2,
        couplings: int = 3,
        hidden: int = 64,
        context: int = 0,
        embed: nn.Module | None = None,
        alpha: float = 0.05,
        scale_map: ScaleMap | str = "realnvp",
        actnorm: bool = True,
        network: ConvNetwork = "conv",
        depth: int = 2,
        dropout: float = 0.0,
        grey_levels: int = 256,
    ) -> None:
        channels, height, width = _checked_shape(shape, levels)
        check_table(channels, couplings, hidden, context, embed, "RealNVP")
        check_choice("network", network, ConvNetwork)
        scale_map = ScaleMap.parse(scale_map)
        per_channel = 2 if scale_map.has_scale else 1
        gain = scale_map.kind == "tanh"

        def coupling(inputs: int, transformed: int, **split: Any) -> list[Bijection]:
            options: dict[str, Any] = {"context_channels": context, "dropout": dropout}
            net: ConvResidualNet | ConvConditioner
            if network == "residual":
                net = ConvResidualNet(inputs, hidden, per_channel * transformed, blocks=depth, **options)
            else:
                net = ConvConditioner(inputs, hidden, per_channel * transformed, **options)
            made = AffineCoupling(net, scale_map=scale_map, learned_gain=gain, **split)
            return [made, ActNorm(channels)] if actnorm else [made]

        levels_made: list[Bijection] = []
        shapes = []
        for level in range(levels):
            last = level == levels - 1
            parts: list[Bijection] = []
            for i in range(couplings + last):
                board = masks.checkerboard(height, width, even=i % 2 == 0)
                parts += coupling(channels, channels, mask=board)
            if not last:
                parts.append(Squeeze(2))
                channels, height, width = channels * 4, height // 2, width // 2
                for i in range(couplings):
                    first = channels - channels // 2
                    kept = first if i % 2 == 0 else channels - first
                    parts += coupling(kept, channels - kept, identity="first" if i % 2 == 0 else "second")
            levels_made.append(Chain(parts))
            shapes.append((channels, height, width))
            if not last:
                channels -= channels // 2
        super().__init__(
            Chain(Logit(alpha), MultiScale(levels_made, shapes)),
            StandardNormal(int(torch.Size(shape).numel())),
            shape,
            grey_levels=grey_levels,
            embed=embed,
        )

    def split_latent(self, z: Tensor) -> list[Tensor]:
        """The latents of every level, finest first, each ``[B, c, h, w]`` (views of ``z [B, D]``)."""
        levels: Any = self.bijection[1]
        return levels.split(z)


def _checked_shape(shape: Sequence[int], levels: int) -> tuple[int, int, int]:
    if isinstance(shape, int) or len(shape) != 3 or any(n < 1 for n in shape):
        given = shape if isinstance(shape, int) else tuple(shape)
        raise ValueError(f"an image's shape is (channels, height, width), got {given}")
    if levels < 1:
        raise ValueError(f"a RealNVP of images needs at least 1 level, got {levels}")
    channels, height, width = shape
    factor = 2 ** (levels - 1)
    if height % factor or width % factor or height * width // factor**2 < 2:
        raise ValueError(
            f"images of {height} x {width} have no {levels} levels: both sides must be multiples of {factor}, and at "
            "least two pixels must remain on the last level"
        )
    return channels, height, width
