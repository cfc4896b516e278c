"""Coupling layers: part of the data passes through and decides, by a network, how the rest is transformed."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..ops import ScaleMap, affine_coupling, affine_coupling_from_output
from ..ops.affine_coupling import IdentityName, LayoutName, OrderName, _choice
from ..reference.affine_coupling import Identity, Layout, Order, compute_dtype
from .bijection import Bijection, check_floating, valid_mask
from .config import Recorded
from .conv_net import check_precision
from .replay import gradients


class AffineCoupling(Bijection):
    """``y = x * s + t`` (or ``(x + t) * s``) on half of the channels, with s and t from the other half.

    Args:
        conditioner: module ``(x_identity, context) -> params``, or of x_identity alone; x_identity is the half that
            passes through, ``[B, C - Ct, *spatial]``, params ``[B, 2 Ct, *spatial]`` (Ct for ``"additive"``). The
            context goes to a parameter named ``context``, or to a second one without a default. It runs in the
            caller's autocast precision, the coupling itself in float32. One that sets ``takes_mask`` is called with
            ``mask=`` where lengths are given.
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
            if not self.scale_map.has_scale:
                raise ValueError("learned_gain scales the scale map's gain, and the additive map has no scale")
            count = learned_gain
            if learned_gain is True:
                if not hasattr(conditioner, "out_channels"):
                    raise ValueError("learned_gain=True needs conditioner.out_channels: give the number of channels")
                count = conditioner.out_channels // 2
            self.gain = nn.Parameter(torch.ones(int(count)))

    @property
    def uses_context(self):
        return self._with_context is not None

    def forward(self, x, context=None, *, lengths=None):
        return self._run(x, context, lengths, False)

    def inverse(self, z, context=None, *, lengths=None):
        return self._run(z, context, lengths, True)

    @torch.no_grad()
    def from_output(self, z, dz, dlogdet, wanted, context=None, *, lengths=None):
        # The half that the network reads passes through: it runs once more, on the output.
        kept, mask = self._kept(z).detach().requires_grad_(), valid_mask(z, lengths)
        with torch.enable_grad():
            params = call_conditioner(self.conditioner, kept, context, mask, self._with_context)
            options = self._options(z)
        x, dx, dparams, dgain = affine_coupling_from_output(z, params.detach(), dz, dlogdet, mask=mask, **options)
        outputs, given = [params], [dparams]
        if dgain is not None:  # a graph, and not the parameter alone: it may be made of others
            outputs, given = [params, options["gain"]], [dparams, dgain]
        through, *found = gradients(outputs, [kept, *wanted], given)
        if through is not None:
            self._kept(dx).add_(through)
        return x, dx, found

    def _run(self, x: Tensor, context: Tensor | None, lengths: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        check_floating(x, "AffineCoupling")
        if x.dim() < 2 or x.shape[1] < 2:
            raise ValueError(f"a coupling needs data [B, C, *spatial] of at least 2 channels, got {tuple(x.shape)}")
        mask = valid_mask(x, lengths)
        params = call_conditioner(self.conditioner, self._kept(x), context, mask, self._with_context)
        check_precision(params, x, "AffineCoupling")
        return affine_coupling(x, params, inverse=inverse, mask=mask, **self._options(x))

    def _kept(self, x: Tensor) -> Tensor:
        """The half that passes through."""
        split = x.shape[1] - x.shape[1] // 2
        return x.narrow(1, 0, split) if self.identity == "first" else x.narrow(1, split, x.shape[1] - split)

    def _options(self, x: Tensor) -> dict[str, Any]:
        gain = None if self.gain is None else self.gain.to(compute_dtype(x))
        named = {"scale_map": self.scale_map, "order": self.order, "layout": self.layout, "identity": self.identity}
        return {**named, "gain": gain}

    def extra_repr(self) -> str:
        return f"scale_map={self.scale_map}, order={self.order!r}, layout={self.layout!r}, identity={self.identity!r}"


def takes_context(conditioner: nn.Module) -> Literal["positional", "keyword"] | None:
    """How a conditioner takes the context: an ``nn.Sequential`` does not, nor one built with ``context_channels=0``.

    Whatever else has a default (``scale=2.0``) is not the context's place.
    """
    if getattr(conditioner, "context_channels", None) == 0:
        return None
    inner = getattr(conditioner, "_orig_mod", conditioner)  # torch.compile wraps it in a forward of (*args, **kwargs)
    parameters = inspect.signature(inner.forward).parameters.values()
    by_position = [p for p in parameters if p.kind <= inspect.Parameter.POSITIONAL_OR_KEYWORD]
    if len(by_position) > 1 and (by_position[1].name == "context" or by_position[1].default is inspect.Parameter.empty):
        return "positional"
    named = [p for p in parameters if p.name == "context" and p.kind != inspect.Parameter.POSITIONAL_ONLY]
    return "keyword" if named else None


def call_conditioner(
    conditioner: nn.Module,
    x: Tensor,
    context: Tensor | None,
    mask: Tensor | None,
    how: Literal["positional", "keyword"] | None,
) -> Tensor:
    args = (x, context) if how == "positional" else (x,)
    options = {"context": context} if how == "keyword" else {}
    if mask is not None and getattr(conditioner, "takes_mask", False):
        options["mask"] = mask
    return conditioner(*args, **options)


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

    @property
    def uses_context(self):
        return self._with_context is not None

    def forward(self, x, context=None, *, lengths=None):
        return self._run(self.transform, x, context, lengths)

    def inverse(self, z, context=None, *, lengths=None):
        return self._run(self.transform.inverse, z, context, lengths)

    def _run(self, transform, x: Tensor, context: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        check_floating(x, "Coupling")
        valid = valid_mask(x, lengths)
        if self.by_channel:
            if x.dim() < 2 or x.shape[1] != self.channel_map.shape[0]:
                raise ValueError(f"mask chooses among {self.channel_map.shape[0]} channels, got data {tuple(x.shape)}")
            kept = x.index_select(1, self.kept)
            params = call_conditioner(self.conditioner, kept, context, valid, self._with_context)
            check_precision(params, x, "Coupling")
            return transform(x, params, mask=valid, channel_map=self.channel_map)
        fits = x.dim() == self.mask.dim() + 1
        fits = fits and all(m in (1, n) for m, n in zip(self.mask.shape, x.shape[1:], strict=True))
        if not fits:
            raise ValueError(f"mask {tuple(self.mask.shape)} does not fit data of shape {tuple(x.shape)}")
        kept = torch.where(self.mask, 0.0, x)
        params = call_conditioner(self.conditioner, kept, context, valid, self._with_context)
        check_precision(params, x, "Coupling")
        mask = self.mask[None]
        return transform(x, params, mask=mask if valid is None else mask & valid, channel_map=None)
