"""Coupling layers: part of the data passes through and decides, by a network, how the rest is transformed."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from ..ops import ScaleMap, affine_coupling
from ..ops.affine_coupling import IdentityName, LayoutName, OrderName, _choice
from ..reference.affine_coupling import Identity, Layout, Order, compute_dtype
from .bijection import Bijection, valid_mask
from .config import Recorded


class AffineCoupling(Bijection):
    """``y = x * s + t`` (or ``(x + t) * s``) on half of the channels, with s and t from the other half.

    Args:
        conditioner: module ``(x_identity, context) -> params``, or of x_identity alone; x_identity is the half that
            passes through, ``[B, C - Ct, *spatial]``, params ``[B, 2 Ct, *spatial]`` (Ct for ``"additive"``). It runs
            in the caller's autocast precision, the coupling itself in float32. One that sets ``takes_mask`` is called
            with ``mask=`` where lengths are given.
        scale_map, order, layout: see :func:`nfkernels.affine_coupling`.
        identity: ``"first"``: the leading ``C - C // 2`` channels pass through; ``"second"``: the trailing ``C // 2``.
            The two between them transform every channel.
        learned_gain: one learned factor per transformed channel on the scale map's gain, starting at 1. True takes the
            count from ``conditioner.out_channels``; else give the number of transformed channels.

    Raises ``ValueError`` for data of fewer than 2 channels, or parameters that do not fit it.
    Reference: Dinh et al. 2017 (RealNVP), eq. 7-8; Kingma & Dhariwal 2018 (Glow), table 1.
    """

    def __init__(
        self,
        conditioner: nn.Module,
        *,
        scale_map: ScaleMap | str = "glow",
        order: OrderName = "scale_first",
        layout: LayoutName = "shift_scale",
        identity: IdentityName = "first",
        learned_gain: bool | int = False,
    ) -> None:
        super().__init__()
        self.conditioner, self._with_context = conditioner, takes_context(conditioner)
        self.scale_map = ScaleMap.parse(scale_map)
        _choice(Order, order, "order"), _choice(Layout, layout, "layout"), _choice(Identity, identity, "identity")
        if identity == "none":
            raise ValueError('AffineCoupling needs a half that passes through: identity="first" or "second"')
        self.order, self.layout, self.identity = order, layout, identity
        self.gain = None
        if learned_gain is not False:
            count = learned_gain
            if learned_gain is True:
                if not hasattr(conditioner, "out_channels"):
                    raise ValueError("learned_gain=True needs conditioner.out_channels: give the number of channels")
                count = conditioner.out_channels // 2
            self.gain = nn.Parameter(torch.ones(int(count)))

    def forward(self, x, context=None, *, lengths=None):
        return self._run(x, context, lengths, False)

    def inverse(self, z, context=None, *, lengths=None):
        return self._run(z, context, lengths, True)

    def _run(self, x: Tensor, context: Tensor | None, lengths: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        if x.dim() < 2 or x.shape[1] < 2:
            raise ValueError(f"a coupling needs data [B, C, *spatial] of at least 2 channels, got {tuple(x.shape)}")
        split = x.shape[1] - x.shape[1] // 2
        kept = x.narrow(1, 0, split) if self.identity == "first" else x.narrow(1, split, x.shape[1] - split)
        mask = valid_mask(x, lengths)
        params = call_conditioner(self.conditioner, kept, context, mask, self._with_context)
        return affine_coupling(
            x, params, scale_map=self.scale_map, order=self.order, layout=self.layout, identity=self.identity,
            inverse=inverse, mask=mask, gain=None if self.gain is None else self.gain.to(compute_dtype(x)),
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"scale_map={self.scale_map}, order={self.order!r}, layout={self.layout!r}, identity={self.identity!r}"


def takes_context(conditioner: nn.Module) -> bool:
    """Whether a conditioner has a second argument: an ``nn.Sequential`` has none, and is given x alone."""
    kinds = [p.kind for p in inspect.signature(conditioner.forward).parameters.values()]
    return len([k for k in kinds if k <= inspect.Parameter.POSITIONAL_OR_KEYWORD]) > 1 or (
        inspect.Parameter.VAR_POSITIONAL in kinds
    )


def call_conditioner(
    conditioner: nn.Module, x: Tensor, context: Tensor | None, mask: Tensor | None, with_context: bool = True
) -> Tensor:
    if not with_context:
        return conditioner(x)
    if mask is not None and getattr(conditioner, "takes_mask", False):
        return conditioner(x, context, mask=mask)
    return conditioner(x, context)


class AffineTransform(Recorded, nn.Module):
    """``x * s + t`` for :class:`Coupling`; params ``[B, 2 Ct, *spatial]``, options as in ``affine_coupling``.

    A transform is any object with ``forward(x, params, *, mask, channel_map) -> (y, logdet)`` and an ``inverse`` of the
    same form; what mask and channel_map leave out passes through and adds nothing to logdet ``[B]``.
    """

    def __init__(
        self,
        scale_map: ScaleMap | str = "glow",
        *,
        order: OrderName = "scale_first",
        layout: LayoutName = "shift_scale",
    ) -> None:
        super().__init__()
        self.scale_map = ScaleMap.parse(scale_map)
        _choice(Order, order, "order"), _choice(Layout, layout, "layout")
        self.order, self.layout = order, layout

    def forward(self, x, params, *, mask=None, channel_map=None):
        return self._run(x, params, mask, channel_map, False)

    def inverse(self, x, params, *, mask=None, channel_map=None):
        return self._run(x, params, mask, channel_map, True)

    def _run(self, x, params, mask, channel_map, inverse):
        return affine_coupling(
            x, params, scale_map=self.scale_map, order=self.order, layout=self.layout, inverse=inverse, mask=mask,
            channel_map=channel_map,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{self.scale_map}, order={self.order!r}, layout={self.layout!r}"


class AdditiveTransform(AffineTransform):
    """``x + t``: volume preserving, params ``[B, Ct, *spatial]`` (NICE, Dinh et al. 2014)."""

    def __init__(self) -> None:
        super().__init__("additive")


class Coupling(Bijection):
    """A coupling of any transform, any conditioner and any split of the elements.

    Args:
        transform: see :class:`AffineTransform`.
        conditioner: module ``(x_identity, context) -> params``.
        mask: bool, True where an element is transformed. ``[C]``: a choice of channels; the conditioner is given those
            that pass through, ``[B, C - Ct, *spatial]``, and returns parameters for the Ct others, in their order.
            ``[C or 1, *spatial]`` (a checkerboard is ``[1, H, W]``): the conditioner is given all of x with the
            transformed elements at zero, and returns parameters for all C channels.

    Raises ``ValueError`` for a mask that transforms nothing or everything, or that does not fit the data.
    """

    def __init__(self, transform: nn.Module, conditioner: nn.Module, mask: Tensor) -> None:
        super().__init__()
        if mask.dtype != torch.bool or mask.dim() < 1:
            raise ValueError(f"mask must be bool, [C] or [C, *spatial], got {mask.dtype} {tuple(mask.shape)}")
        if not mask.is_meta and bool(mask.all() | ~mask.any()):
            raise ValueError("mask must transform some elements and let others pass: all of it is one value")
        self.transform, self.conditioner, self._with_context = transform, conditioner, takes_context(conditioner)
        self.by_channel = mask.dim() == 1
        if self.by_channel:
            order = mask.cumsum(0) - 1
            self.register_buffer("channel_map", torch.where(mask, order, -1))
            self.register_buffer("kept", (~mask).nonzero()[:, 0])
        else:
            self.register_buffer("mask", mask.clone())

    def forward(self, x, context=None, *, lengths=None):
        return self._run(self.transform, x, context, lengths)

    def inverse(self, z, context=None, *, lengths=None):
        return self._run(self.transform.inverse, z, context, lengths)

    def _run(self, transform, x: Tensor, context: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        valid = valid_mask(x, lengths)
        if self.by_channel:
            if x.dim() < 2 or x.shape[1] != self.channel_map.shape[0]:
                raise ValueError(f"mask chooses among {self.channel_map.shape[0]} channels, got data {tuple(x.shape)}")
            kept = x.index_select(1, self.kept)
            params = call_conditioner(self.conditioner, kept, context, valid, self._with_context)
            return transform(x, params, mask=valid, channel_map=self.channel_map)
        fits = x.dim() == self.mask.dim() + 1
        fits = fits and all(m in (1, n) for m, n in zip(self.mask.shape, x.shape[1:], strict=True))
        if not fits:
            raise ValueError(f"mask {tuple(self.mask.shape)} does not fit data of shape {tuple(x.shape)}")
        kept = torch.where(self.mask, 0.0, x)
        params = call_conditioner(self.conditioner, kept, context, valid, self._with_context)
        mask = self.mask[None]
        return transform(x, params, mask=mask if valid is None else mask & valid, channel_map=None)
