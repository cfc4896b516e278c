"""Coupling layers: part of the data passes through and decides, by a network, how the rest is transformed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..ops import ScaleMap, Spline, affine_coupling_from_output
from ..ops.affine_coupling import LayoutName, OrderName
from ..reference.affine_coupling import compute_dtype
from .bijection import Bijection, check_floating, valid_mask
from .conditioning import call_conditioner, takes_context
from .conv_net import check_precision
from .replay import gradients
from .transforms import AdditiveTransform, AffineTransform, SplineTransform

IdentityHalf = Literal["first", "second"]


class Coupling(Bijection):
    """A coupling of any transform, any conditioner and any split of the elements.

    Args:
        transform: see :class:`AffineTransform`.
        conditioner: module ``(x_identity, context) -> params``, or of x_identity alone. The context goes to a parameter
            named ``context``, or to a second one without a default. It runs in the caller's autocast precision, the
            transform itself in float32. One that sets ``takes_mask`` is called with ``mask=`` where lengths are given.
        mask: bool, True where an element is transformed (:mod:`nfkernels.nn.masks` makes the usual ones). ``[C]``: a
            choice of channels; the conditioner is given those that pass through, ``[B, C - Ct, *spatial]``, and returns
            parameters for the Ct others, in their order. ``[C or 1, *spatial]`` (a checkerboard is ``[1, H, W]``): the
            conditioner is given all of x with the transformed elements at zero, and returns parameters for all C
            channels.
        identity: instead of a mask, for affine transforms: the half of the channels that passes through, whatever
            their number C, the leading ``C - C // 2`` (``"first"``) or the trailing ``C // 2`` (``"second"``). The two
            between them transform every channel.

    Raises ``ValueError`` for a mask that transforms nothing or everything, or that does not fit the data.
    """

    transform: Any  # of the form that AffineTransform tells
    channel_map: Tensor
    kept: Tensor
    mask: Tensor

    def __init__(
        self,
        transform: nn.Module,
        conditioner: nn.Module,
        mask: Tensor | None = None,
        *,
        identity: IdentityHalf | None = None,
    ) -> None:
        super().__init__()
        self.transform, self.conditioner, self._with_context = transform, conditioner, takes_context(conditioner)
        self.identity = identity
        if (mask is None) == (identity is None):
            raise ValueError(f"{type(self).__name__} splits by a mask or by identity: give one of them")
        if mask is None:
            if identity not in ("first", "second"):
                raise ValueError(
                    f'{type(self).__name__} needs a half that passes through: identity="first" or "second", '
                    f"got {identity!r}"
                )
            if not isinstance(transform, AffineTransform):
                raise ValueError(f"identity goes with an affine transform: give this {_kind(transform)} a mask")
            self.split = "halves"
            return
        if mask.dtype != torch.bool or mask.dim() < 1:
            raise ValueError(f"mask must be bool, [C] or [C, *spatial], got {mask.dtype} {tuple(mask.shape)}")
        if not mask.is_meta and bool(mask.all() | ~mask.any()):
            raise ValueError("mask must transform some elements and let others pass: all of it is one value")
        if mask.dim() == 1:
            self.split = "channels"
            order = mask.cumsum(0) - 1
            self.register_buffer("channel_map", torch.where(mask, order, -1))
            self.register_buffer("kept", (~mask).nonzero()[:, 0])
            self._kept_slice = as_slice(self.kept)
        else:
            self.split = "elements"
            self.register_buffer("mask", mask.clone())

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.split == "channels":
            self._kept_slice = as_slice(self.kept)

    @property
    def uses_context(self) -> bool:
        return self._with_context is not None

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._run(self.transform, x, context, lengths)

    def inverse(
        self, z: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._run(self.transform.inverse, z, context, lengths)

    def _run(
        self, transform: Callable[..., tuple[Tensor, Tensor]], x: Tensor, context: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        check_floating(x, type(self).__name__)
        valid = valid_mask(x, lengths)
        kept, where = self._split(x, valid)
        params = call_conditioner(self.conditioner, kept, context, valid, self._with_context)
        check_precision(params, x, type(self).__name__)
        return transform(x, params, **where, **self._options(x))

    def _split(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
        """What the conditioner is given, and where the transform acts."""
        if self.split == "halves":
            if x.dim() < 2 or x.shape[1] < 2:
                raise ValueError(f"a coupling needs data [B, C, *spatial] of at least 2 channels, got {tuple(x.shape)}")
            return self._half(x), {"mask": valid, "identity": self.identity}
        if self.split == "channels":
            if x.dim() < 2 or x.shape[1] != self.channel_map.shape[0]:
                raise ValueError(f"mask chooses among {self.channel_map.shape[0]} channels, got data {tuple(x.shape)}")
            # A slice is a view; index_select copies, and its gradient adds up.
            kept = x.index_select(1, self.kept) if self._kept_slice is None else x[:, self._kept_slice]
            return kept, {"mask": valid, "channel_map": self.channel_map}
        fits = x.dim() == self.mask.dim() + 1
        fits = fits and all(m in (1, n) for m, n in zip(self.mask.shape, x.shape[1:], strict=True))
        if not fits:
            raise ValueError(f"mask {tuple(self.mask.shape)} does not fit data of shape {tuple(x.shape)}")
        mask = self.mask[None]
        where = {"mask": mask if valid is None else mask & valid, "channel_map": None}
        return torch.where(self.mask, 0.0, x), where

    def _half(self, x: Tensor) -> Tensor:
        """The half that passes through."""
        split = x.shape[1] - x.shape[1] // 2
        return x.narrow(1, 0, split) if self.identity == "first" else x.narrow(1, split, x.shape[1] - split)

    def _options(self, x: Tensor) -> dict[str, Any]:
        """What else the transform is given."""
        return {}


class AffineCoupling(Coupling):
    """``y = x * s + t`` (or ``(x + t) * s``) on part of the elements, with s and t from the others.

    Args:
        conditioner: see :class:`Coupling`; params ``[B, 2 Ct, *spatial]`` (Ct for ``"additive"``).
        scale_map, order, layout: see :func:`nfkernels.affine_coupling`.
        identity, mask: the half that passes through (``"first"`` by default), or any split; see :class:`Coupling`.
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
        identity: IdentityHalf | None = None,
        learned_gain: bool | int = False,
        mask: Tensor | None = None,
    ) -> None:
        identity = "first" if identity is None and mask is None else identity
        super().__init__(AffineTransform(scale_map, order=order, layout=layout), conditioner, mask, identity=identity)
        self.scale_map, self.order, self.layout = self.transform.scale_map, order, layout
        self.gain = None
        if learned_gain is not False:
            if not self.scale_map.has_scale:
                raise ValueError("learned_gain scales the scale map's gain, and the additive map has no scale")
            count = int(learned_gain)
            if learned_gain is True:
                out: Any = getattr(conditioner, "out_channels", None)
                if out is None:
                    raise ValueError("learned_gain=True needs conditioner.out_channels: give the number of channels")
                count = out // 2
            self.gain = nn.Parameter(torch.ones(count))

    @torch.no_grad()
    def from_output(
        self,
        z: Tensor,
        dz: Tensor | None,
        dlogdet: Tensor | None,
        wanted: Sequence[Tensor],
        context: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
        if self.split != "halves":
            return super().from_output(z, dz, dlogdet, wanted, context, lengths=lengths)
        # The half that the network reads passes through: it runs once more, on the output.
        valid = valid_mask(z, lengths)
        kept, where = self._split(z, valid)
        kept = kept.detach().requires_grad_()
        with torch.enable_grad():
            params = call_conditioner(self.conditioner, kept, context, valid, self._with_context)
            options = {**where, **self.transform.options, **self._options(z)}
        x, dx, dparams, dgain = affine_coupling_from_output(z, params.detach(), dz, dlogdet, **options)
        outputs, given = [params], [dparams]
        if dgain is not None:  # a graph, and not the parameter alone: it may be made of others
            outputs, given = [params, options["gain"]], [dparams, dgain]
        through, *found = gradients(outputs, [kept, *wanted], given)
        if through is not None:
            self._half(dx).add_(through)
        return x, dx, found

    def _options(self, x: Tensor) -> dict[str, Any]:
        return {} if self.gain is None else {"gain": self.gain.to(compute_dtype(x))}

    def extra_repr(self) -> str:
        split = f"identity={self.identity!r}" if self.split == "halves" else f"mask of {self.split}"
        return f"{self.transform.extra_repr()}, {split}"


class AdditiveCoupling(Coupling):
    """``y = x + t`` on part of the elements, with t ``[B, Ct, *spatial]`` from the others: volume preserving.

    ``identity`` or ``mask`` as for :class:`AffineCoupling`. Reference: Dinh et al. 2014 (NICE), eq. 9-10.
    """

    def __init__(
        self, conditioner: nn.Module, *, identity: IdentityHalf | None = None, mask: Tensor | None = None
    ) -> None:
        identity = "first" if identity is None and mask is None else identity
        super().__init__(AdditiveTransform(), conditioner, mask, identity=identity)


class SplineCoupling(Coupling):
    """A monotonic rational-quadratic spline on part of the elements, its knots from the others.

    Args:
        conditioner: see :class:`Coupling`; params ``[B, Ct * P, *spatial]``, P = ``spline.params_per_element``.
        mask: any split; see :class:`Coupling`.
        spline: a :class:`nfkernels.Spline` or a preset's name: bins, interval, tails.

    Cost: one pass over x and params. Raises ``ValueError`` as :class:`Coupling`.
    Reference: Durkan et al. 2019 (Neural Spline Flows), section 3.
    """

    def __init__(self, conditioner: nn.Module, mask: Tensor, *, spline: Spline | str = Spline()) -> None:  # noqa: B008
        super().__init__(SplineTransform(spline), conditioner, mask)


def as_slice(indices: Tensor) -> slice | None:
    """The slice that selects what ascending ``indices`` do, if there is one."""
    if indices.is_meta:
        return None
    numbers = indices.tolist()
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    same = step > 0 and numbers == list(range(numbers[0], numbers[-1] + 1, step))
    return slice(numbers[0], numbers[-1] + 1, step) if same else None


def _kind(transform: nn.Module) -> str:
    return type(transform).__name__
