"""Masked autoregressive layers: every feature is transformed by what comes before it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import ScaleMap, Spline, autoregressive_inverse
from ..ops._library import under_transform
from ..reference.affine_coupling import compute_dtype
from .bijection import Bijection, check_channels, check_width, refuse_lengths
from .conditioning import call_conditioner, takes_context
from .conv_net import check_precision
from .in_turn import invert_in_turn
from .masked_mlp import MaskedMLP
from .replay import call_with, gradients
from .transforms import AffineTransform, SplineTransform, identity_params

_INTERLEAVED = ("shift_scale_interleaved", "scale_shift_interleaved")
HIDDEN = 64  # width of the network that is made where none is given


class MaskedAutoregressive(Bijection):
    """``z_i = f(x_i; p_i(x_before))`` on ``x [B, D]``: every feature transformed by what comes before it.

    The forward (data to latent, what a density needs) is one pass of the network. The inverse (samples) takes
    ``passes`` of them: the features of one degree each, from what the earlier passes found. ``layer.inv`` has the
    directions the other way round: an inverse autoregressive flow, which samples in one pass.

    Args:
        features: D.
        transform: the elementwise f. ``"affine"`` (zuko's soft-clipped exponential, the identity at the start), a
            :class:`~nfkernels.ScaleMap` or a preset's name: ``x * s + t``; a :class:`~nfkernels.Spline`; or any
            transform that :class:`Coupling` takes, in whose params the features' lie one after the other (affine:
            ``layout="shift_scale_interleaved"`` or ``"scale_shift_interleaved"``).
        conditioner: module ``(x, context) -> params [B, D * P]`` in which the params of a feature depend on those
            before it alone. Default: a :class:`MaskedMLP` of two layers of 64. One of one's own may be anything:
            ``flow.check(x)`` tells if it sees what it must not. One that draws random numbers (dropout in training)
            has no inverse.
        passes: how many calls of the conditioner find x; a :class:`MaskedMLP` (or any conditioner with a number
            ``passes``) knows it, others take D, in any order of the features.

    Gradients of the inverse do not go back through the passes: the backward solves for them with one call of the
    conditioner and ``passes`` products with its transposed Jacobian, and keeps x alone.

    Raises ``ValueError`` for data that is not ``[B, D]``, and for parts that do not fit each other.
    Reference: Papamakarios et al. 2017 (MAF), section 3; Kingma et al. 2016 (IAF), section 3.
    """

    def __init__(
        self,
        features: int,
        *,
        transform: nn.Module | ScaleMap | Spline | str = "affine",
        conditioner: nn.Module | None = None,
        passes: int | None = None,
    ) -> None:
        super().__init__()
        check_width(features, "MaskedAutoregressive", "feature")
        self.transform: Any  # of the form that AffineTransform tells
        self.features, self.transform = features, as_transform(transform)
        count = params_per_feature(self.transform)
        if conditioner is None:
            if count is None:
                kind = type(self.transform).__name__
                raise ValueError(f"a {kind} does not say how many params it takes: give the conditioner")
            conditioner = MaskedMLP(features, HIDDEN, count)
            start_as_identity(conditioner, self.transform)
        if isinstance(conditioner, MaskedMLP):
            _check_network(conditioner, self.transform, features, count)
        self.conditioner, self._with_context = conditioner, takes_context(conditioner)
        least = getattr(conditioner, "passes", 1)
        if passes is not None and not least <= passes <= features:
            raise ValueError(f"passes must be from {least} to {features} here, got {passes}")
        self._passes = passes

    @property
    def passes(self) -> int:
        """How many calls of the conditioner an inverse takes."""
        return self._passes or getattr(self.conditioner, "passes", None) or self.features

    @property
    def uses_context(self) -> bool:
        return self._with_context is not None

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        self._check(x, lengths)
        return self.transform(x, self._params(x, context))

    def inverse(
        self, z: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        self._check(z, lengths)
        made = self._fused(z, context)
        if made is not None:
            return made
        if torch.compiler.is_compiling() or under_transform():
            return self._by_passes(z, context)
        tensors = [context, *self.parameters()] if torch.is_grad_enabled() else []
        if not tensors or not any(t is not None and t.requires_grad for t in (z, *tensors)):
            with torch.no_grad():
                return self._in_turn(z, context)
        return _Solved.apply(_Inner(self), z, *tensors)

    def _params(self, x: Tensor, context: Tensor | None) -> Tensor:
        params = call_conditioner(self.conditioner, x, context, None, self._with_context)
        return check_precision(params, x, "MaskedAutoregressive")

    def _network(self, z: Tensor, context: Tensor | None) -> dict[str, Any] | None:
        """The network as the op takes it; None where it, or the transform, may be anything."""
        known = isinstance(self.transform, AffineTransform) or type(self.transform) is SplineTransform
        if not known or not isinstance(self.conditioner, MaskedMLP):
            return None
        return self.conditioner.network(z, context if self.uses_context else None)

    def _fused(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """All passes in one op, which has its own gradient; None where no kernel knows this layer."""
        transform = self.transform
        if not getattr(self.conditioner, "fused", False):
            return None
        network = self._network(z, context)
        if network is None:
            return None
        if isinstance(transform, SplineTransform):
            return autoregressive_inverse(z, transform=transform.spline, **network)
        layout = transform.layout.removesuffix("_interleaved")
        return autoregressive_inverse(z, transform=transform.scale_map, order=transform.order, layout=layout, **network)

    def _in_turn(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Without gradients: by passes that compute what is new in each, where the network is known."""
        network = self._network(z, context)
        if network is None or z.dtype != compute_dtype(z):
            return self._by_passes(z, context)
        network.pop("activation")
        assert isinstance(self.conditioner, MaskedMLP)
        return invert_in_turn(self.transform, z, self.conditioner._act, **network)

    def _by_passes(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        degrees = getattr(self.conditioner, "degrees", None)
        x = torch.zeros_like(z)
        for turn in range(self.passes):
            if turn:
                # What is not known yet may be anything, infinite too, and zero times that is not zero.
                known = torch.isfinite(x) if degrees is None else degrees < turn
                x = torch.where(known, x, 0.0)
            x, logdet = self.transform.inverse(z, self._params(x, context))
        return x, logdet

    def _check(self, x: Tensor, lengths: Tensor | None) -> None:
        refuse_lengths(lengths, "MaskedAutoregressive")
        check_channels(x, self.features, "MaskedAutoregressive")
        if x.dim() != 2:
            raise ValueError(f"MaskedAutoregressive takes data [B, {self.features}], got shape {tuple(x.shape)}")

    def extra_repr(self) -> str:
        return f"{self.features}, passes={self.passes}"


def as_transform(transform: nn.Module | ScaleMap | Spline | str) -> nn.Module:
    if isinstance(transform, nn.Module):
        return transform
    if isinstance(transform, Spline):
        return SplineTransform(transform)
    scale_map = ScaleMap.zuko() if isinstance(transform, str) and transform == "affine" else transform
    return AffineTransform(scale_map, layout="shift_scale_interleaved")


def params_per_feature(transform: nn.Module) -> int | None:
    """How many numbers a transform takes for one feature; None where it does not say."""
    if isinstance(transform, AffineTransform):
        return 2 if transform.scale_map.has_scale else 1
    return transform.spline.params_per_element if isinstance(transform, SplineTransform) else None


def start_as_identity(network: MaskedMLP, transform: nn.Module) -> None:
    """At zero params an affine transform is what its map makes of 0; splines start as the identity."""
    if isinstance(transform, SplineTransform):
        with torch.no_grad():
            network.last.bias.copy_(identity_params(transform.spline, network.features))


def _check_network(network: MaskedMLP, transform: nn.Module, features: int, count: int | None) -> None:
    if network.features != features:
        raise ValueError(f"the MaskedMLP is for {network.features} features, the layer for {features}")
    if count is not None and network.params_per_feature != count:
        raise ValueError(
            f"this transform takes {count} params per feature, but the MaskedMLP gives {network.params_per_feature}"
        )
    if count == 2 and isinstance(transform, AffineTransform) and transform.layout not in _INTERLEAVED:
        raise ValueError(
            "a MaskedMLP gives the params of one feature side by side: build the AffineTransform with "
            f"layout='shift_scale_interleaved' or 'scale_shift_interleaved', got {transform.layout!r}"
        )


# --- gradients of the inverse -----------------------------------------------------------------------------------------


class _Inner(nn.Module):
    """What a backward needs of the layer, as functions of its tensors: hold those of the forward, though
    ``torch.func.functional_call`` has returned since, and its autocast."""

    def __init__(self, layer: MaskedAutoregressive) -> None:
        super().__init__()
        self.layer = layer
        self.names = [f"layer.{name}" for name, _ in layer.named_parameters()]
        device = next(iter(layer.parameters()), torch.empty(0)).device.type
        device = "cpu" if device == "meta" else device  # which has no autocast
        self.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

    def call(self, what: str, tensors: list[Tensor | None], *args: Any) -> Any:
        named = dict(zip(self.names, tensors[1:], strict=True))
        return call_with(self, named, (what, tensors[0], *args))

    def forward(self, what: str, context: Tensor | None, *args: Any) -> Any:
        if what == "passes":
            return self.layer._by_passes(args[0], context)
        known, z = args
        return self.layer.transform.inverse(z, self.layer._params(known, context))

    @contextlib.contextmanager
    def as_in_forward(self) -> Iterator[None]:
        device, dtype, enabled = self.autocast
        # Without autocast's cache: weights cast in here would outlive the graph they were cast in.
        with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False):
            yield


class _Solved(torch.autograd.Function):
    """Saves x, z and the parameters. With ``x = h(z; p(x))`` a gradient g at x becomes the u of ``(1 - M^T) u = g``,
    ``M = dh/dp dp/dx``. M is strictly triangular: as many products with its transpose as there are passes, less one,
    give u to the last digit, and nothing is divided."""

    @staticmethod
    def forward(ctx: Any, inner: _Inner, z: Tensor, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        x, logdet = inner.layer._in_turn(z, tensors[0])
        ctx.save_for_backward(x, z, *tensors)
        ctx.set_materialize_grads(False)
        ctx.inner, ctx.passes = inner, inner.layer.passes
        return x, logdet

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, dlogdet: Tensor | None) -> tuple[Any, ...]:
        x, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]
        if dx is None and dlogdet is None:
            return (None,) * (1 + len(wanted))
        second = torch.is_grad_enabled()
        # Aliases for second derivatives: what is wanted are gradients at these, not at what they were made of.
        own = [
            t if not w else t.view_as(t) if second else t.detach().requires_grad_()
            for t, w in zip(tensors, wanted, strict=True)
        ]
        asked = [t for t, w in zip(own, wanted, strict=True) if w]
        with ctx.inner.as_in_forward():
            if second:
                made = ctx.inner.call("passes", own[1:], own[0])
                found = gradients(made, asked, (dx, dlogdet), create_graph=True)
            else:
                known = x.detach().requires_grad_()
                made = ctx.inner.call("once", own[1:], known, own[0])
                u = _solve(made, known, dx, dlogdet, ctx.passes)
                found = gradients(made, asked, (u, dlogdet))
        rest = iter(found)
        return None, *(next(rest) if w else None for w in wanted)


def _solve(
    made: tuple[Tensor, Tensor], known: Tensor, dx: Tensor | None, dlogdet: Tensor | None, passes: int
) -> Tensor:
    g = torch.zeros_like(known) if dx is None else dx
    if passes == 1:
        return g
    (through,) = gradients(made, [known], (None, dlogdet), retain_graph=True)
    g = u = g if through is None else g + through
    for _ in range(passes - 1):
        (through,) = gradients(made, [known], (u, None), retain_graph=True)
        if through is None:  # the conditioner looks at the context alone
            break
        u = g + through
    return u
