"""Variational dequantisation: a learned distribution of the noise that makes grey levels continuous."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import ScaleMap
from ..reference.affine_coupling import compute_dtype
from .bijection import Bijection, Chain, check_device, check_floating, refuse_lengths
from .conditioners import ConvConditioner
from .config import Recorded
from .coupling import AffineCoupling, IdentityHalf
from .squeeze import Squeeze

# Uniform noise comes in multiples of 2^-24. Half of one keeps it from 0 and 1, where a logit has its poles.
_HALF_STEP = 2.0**-25
# A scale of e^2 per coupling at most, and e^-2 at least.
_SCALE_MAP = ScaleMap.realnvp(2.0)


class VariationalDequantization(Bijection):
    """``u = sigmoid(flow(logit(noise), image))``: uniform noise ``[B, C, H, W]`` in ``[0, 1)`` to noise that suits it.

    With noise uniform in the unit cube, ``log q(u | image) = -logdet``; what :class:`ImageFlow` takes as its
    ``dequantizer``. The context is the image, floating point, shaped like the noise. The flow is ``steps`` affine
    couplings on noise squeezed by 2, that transform the halves of the channels by turns; their networks
    (:class:`ConvConditioner`) read the other half and features of the image, which a network of two convolutions makes
    once. Scales stay between ``e^-2`` and ``e^2`` per coupling. A new one changes nothing: u is the noise, q uniform.

    Args:
        shape: ``(channels, height, width)`` of the images.
        steps: number of couplings.
        hidden: width of all networks.

    Near 0 and 1 the densities are computed from logarithms of sigmoids, and are right where u itself rounds to 0 or 1.
    The inverse takes such a u for its neighbour inside. Cost: the networks, at half the image's height and width.

    Raises ``ValueError`` for odd heights and widths, and for noise and images of another shape. Reference: Ho et al.
    2019 (Flow++), section 3.1; Hoogeboom et al. 2020.
    """

    def __init__(self, shape: Sequence[int], *, steps: int = 4, hidden: int = 32) -> None:
        super().__init__()
        if len(shape) != 3 or any(n < 1 for n in shape):
            raise ValueError(f"an image's shape is (channels, height, width), got {tuple(shape)}")
        channels, height, width = shape
        if height % 2 or width % 2:
            raise ValueError(
                f"VariationalDequantization squeezes images by 2: both sides must be even, got {height} x {width}"
            )
        if steps < 1 or hidden < 1:
            raise ValueError(
                f"VariationalDequantization needs at least 1 step and 1 hidden channel, got {steps} and {hidden}"
            )
        self.shape = tuple(shape)
        self.squeeze = Squeeze(2)
        self.features = ImageFeatures(4 * channels, hidden)
        couplings = []
        for step in range(steps):
            network = ConvConditioner(2 * channels, hidden, 4 * channels, context_channels=hidden)
            # Its last convolution starts at zero already: were both, the image would come in late.
            network.context.reset_parameters()
            side: IdentityHalf = "second" if step % 2 else "first"
            couplings.append(AffineCoupling(network, scale_map=_SCALE_MAP, identity=side))
        self.couplings = Chain(couplings)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        features = self._features(x, context, lengths)
        noise = x.to(compute_dtype(x))
        # 1 - x is exact where it is small.
        low, high = torch.log(noise + _HALF_STEP), torch.log((1 - noise) - _HALF_STEP)
        v, logdet = self.couplings(self.squeeze(low - high)[0], features)
        v = self.squeeze.inverse(v)[0]
        # Summed after they are added up, since a logit's slope and a sigmoid's nearly cancel.
        slopes = F.logsigmoid(v) + F.logsigmoid(-v) - low - high
        return torch.sigmoid(v).to(x.dtype), logdet + slopes.flatten(1).sum(1)

    def inverse(
        self, z: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        features = self._features(z, context, lengths)
        u = z.to(compute_dtype(z)).clamp(_HALF_STEP, 1 - 2 * _HALF_STEP)
        low, high = torch.log(u), torch.log1p(-u)
        v, logdet = self.couplings.inverse(self.squeeze(low - high)[0], features)
        v = self.squeeze.inverse(v)[0]
        slopes = F.logsigmoid(v) + F.logsigmoid(-v) - low - high
        return (torch.sigmoid(v) - _HALF_STEP).to(z.dtype), logdet + slopes.flatten(1).sum(1)

    def _features(self, x: Tensor, image: Tensor | None, lengths: Tensor | None) -> Tensor:
        check_floating(x, "VariationalDequantization")
        refuse_lengths(lengths, "VariationalDequantization")
        check_device(x, self.features.first.weight, "VariationalDequantization")
        if x.shape[1:] != self.shape:
            raise ValueError(
                f"this VariationalDequantization is for images [B, {', '.join(map(str, self.shape))}], "
                f"got noise {tuple(x.shape)}"
            )
        if image is None or image.shape != x.shape or not image.is_floating_point():
            given = "none" if image is None else f"{image.dtype} {tuple(image.shape)}"
            raise ValueError(
                f"VariationalDequantization takes the images as its context, floating point {tuple(x.shape)} like the "
                f"noise, got {given}"
            )
        return self.features(self.squeeze(image)[0])

    def extra_repr(self) -> str:
        return str(self.shape)


class ImageFeatures(Recorded, nn.Module):
    """conv 3, ReLU, conv 3, ReLU: ``[B, channels, H, W]`` to ``[B, width, H, W]``, in the caller's autocast type."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x.to(self.first.weight.dtype)))))
