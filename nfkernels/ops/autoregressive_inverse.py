"""The public autoregressive inverse: degrees, checks, raw schema, fake rule, autograd. Start reading here."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..reference import autoregressive_inverse as reference
from ..reference.affine_coupling import compute_dtype
from ..reference.autoregressive_inverse import AFFINE, SPLINE, Activation, Shape, Transform
from ..reference.rational_quadratic_spline import Form as SplineForm
from ..reference.scale_map import ScaleMap
from ..reference.spline import Spline
from ._layout import canonical
from ._library import define, forced_backend, under_transform
from .affine_coupling import _FLOATS, OrderName, _AffineCoupling, _choice, _like, form_of
from .rational_quadratic_spline import _RationalQuadraticSpline
from .rational_quadratic_spline import form_of as spline_form_of

ActivationName = Literal["relu", "leaky_relu", "elu", "silu", "tanh"]
PairName = Literal["scale_shift", "shift_scale"]

MOST_LAYERS = 8  # hidden ones


# --- degrees --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Degrees:
    """What sees what in a masked network ``[B, D] -> [B, D * P]``.

    Args:
        features: the degree of each feature, in the features' own order: the pass, from 0, that finds it. Features
            may share a degree; every degree up to the highest must occur. ``(0, 1, .., D - 1)`` is the usual order.
        hidden: per hidden layer the degree of each unit, rising: it sees the features of lower degrees, and the
            units of the layer before of degrees up to its own. A feature's params see the units up to its degree, so
            a unit of the highest degree plus one is seen by nothing.

    Raises ``ValueError`` for degrees that are not such.
    """

    features: tuple[int, ...]
    hidden: tuple[tuple[int, ...], ...]
    _tables: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", tuple(int(d) for d in self.features))
        object.__setattr__(self, "hidden", tuple(tuple(int(d) for d in layer) for layer in self.hidden))
        found = set(self.features)
        if found != set(range(len(found))):
            raise ValueError(
                f"the features' degrees must be 0, 1, .. without a gap, got {sorted(found)[:8]}"
                f"{' ..' if len(found) > 8 else ''}"
            )
        if not 1 <= len(self.hidden) <= MOST_LAYERS:
            raise ValueError(f"expected 1 to {MOST_LAYERS} hidden layers, got degrees of {len(self.hidden)}")
        for i, layer in enumerate(self.hidden):
            if any(a > b for a, b in itertools.pairwise(layer)) or (layer and layer[0] < 0):
                raise ValueError(
                    f"the degrees of hidden layer {i} must rise from 0 on: order its units by degree, with the rows of "
                    "its weight and bias and the columns of the next weight"
                )

    @property
    def passes(self) -> int:
        """How many degrees the features have: the network's evaluations that a plain inverse takes."""
        return len(set(self.features))

    def masks(self, params_per_feature: int = 1, device: torch.device | str | None = None) -> list[Tensor]:
        """bool, ``[H_1, D]``, ``[H_2, H_1]`` .. ``[D P, H_last]``: which weights are read, the others count as 0."""
        degrees = [torch.tensor(d, dtype=torch.int64, device=device) for d in (self.features, *self.hidden)]
        rows = degrees[0].repeat_interleave(params_per_feature)
        pairs = [degrees[0][None] < degrees[1][:, None]]
        pairs += [a[None] <= b[:, None] for a, b in zip(degrees[1:], [*degrees[2:], rows], strict=True)]
        return pairs

    def table(self, like: Tensor) -> Tensor:
        """int32 on the device of ``like``, as the kernels read it. For every kind of unit, ``offsets[g]`` counts those
        of degrees below g: the features' ``[passes + 1]``, the features in the order of their degrees, and
        ``[passes + 1]`` of each hidden layer."""
        if torch.compiler.is_compiling() or isinstance(like, torch._subclasses.FakeTensor):
            return torch.tensor(self._numbers(), dtype=torch.int32, device=like.device)
        made = self._tables.get(like.device)
        if made is None:
            with torch.inference_mode(False):
                made = self._tables[like.device] = torch.tensor(self._numbers(), dtype=torch.int32, device=like.device)
        return made

    def _numbers(self) -> list[int]:
        order = sorted(range(len(self.features)), key=self.features.__getitem__)
        numbers = [*self._offsets(self.features), *order]
        for layer in self.hidden:
            numbers += self._offsets(layer)
        return numbers

    def _offsets(self, degrees: Sequence[int]) -> list[int]:
        counts = [0] * (self.passes + 1)
        for degree in degrees:
            if degree < self.passes:
                counts[degree + 1] += 1
        for g in range(self.passes):
            counts[g + 1] += counts[g]
        return counts

    def __getstate__(self) -> dict[str, Any]:
        return {"features": self.features, "hidden": self.hidden, "_tables": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)


# --- raw op: schema, reference, fake --------------------------------------------------------------------------------


def _reference_forward(z, weights, biases, contexts, table, *options):
    *shape, form, constants = options
    return reference.forward(z, weights, biases, contexts, table, Shape(*shape), Transform(form, constants))


def _composite_forward(z, *args):
    x, logdet = _reference_forward(z, *args)
    return _like(x, z), logdet


def _fake_forward(z, *args):
    return torch.empty_like(z), z.new_empty(z.shape[0])


_forward = define(
    "_autoregressive_inverse_forward",
    "(Tensor z, Tensor[] weights, Tensor?[] biases, Tensor?[] contexts, Tensor table, int passes, int activation,"
    " int[] residual, bool final_activation, int[] form, float[] constants) -> (Tensor, Tensor)",
    reference=_composite_forward,
    fake=_fake_forward,
)


# --- autograd -------------------------------------------------------------------------------------------------------


class _AutoregressiveInverse(torch.autograd.Function):
    """Saves x. With ``x = h(z; p(x))`` its gradient solves ``(1 - M^T) u = g``, where ``M = dh/dp dp/dx`` is strictly
    triangular: as many products with M^T as there are passes give u to the last digit, and nothing is divided."""

    @staticmethod
    def forward(ctx: Any, z, table, shape, transform, layers, *tensors):
        groups = _grouped(layers, tensors)
        x, logdet = _forward(z, *groups, table, *shape, *transform)
        ctx.save_for_backward(x, z, *tensors)
        ctx.set_materialize_grads(False)
        ctx.table, ctx.shape, ctx.transform, ctx.layers = table, shape, transform, layers
        return x, logdet

    @staticmethod
    def backward(ctx: Any, dx, dlogdet):
        x, z, *tensors = ctx.saved_tensors
        if dx is None and dlogdet is None:
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled():  # second derivatives: through the passes themselves
            inputs = [z, *tensors]
            made = reference.forward(z, *_grouped(ctx.layers, tensors), ctx.table, ctx.shape, ctx.transform)
            grads = _gradients(made, _wanted(ctx, inputs), (dx, dlogdet), create_graph=True)
        else:
            grads = _implicit(ctx, x, z, tensors, dx, dlogdet)
        spread = iter(grads)
        need = (ctx.needs_input_grad[0], *ctx.needs_input_grad[5:])
        found = [next(spread) if n else None for n in need]
        return found[0], None, None, None, None, *found[1:]


def _implicit(ctx, x, z, tensors, dx, dlogdet) -> list[Tensor | None]:
    leaves = [t if t is None else t.detach().requires_grad_(t.is_floating_point()) for t in (z, *tensors)]
    with torch.enable_grad():
        known = x.detach().requires_grad_()
        weights, biases, contexts = _grouped(ctx.layers, leaves[1:])
        widths = [w.shape[0] for w in weights[:-1]]
        degrees = reference.degrees_of(ctx.table, z.shape[1], widths, ctx.shape.passes)
        masked = reference.masked_weights(weights, degrees, x.dtype)
        params = reference.network(known, masked, biases, contexts, ctx.shape)
        out, total = _elementwise(leaves[0], params, ctx.transform)
    g = torch.zeros_like(x) if dx is None else dx
    if dlogdet is not None and ctx.shape.passes > 1:
        (through,) = _gradients([total], [known], [dlogdet], retain_graph=True)
        g = g if through is None else g + through
    u = g
    for _ in range(ctx.shape.passes - 1):
        (through,) = _gradients([out], [known], [u], retain_graph=True)
        if through is None:
            break
        u = g + through
    return _gradients([out, total], _wanted(ctx, leaves), [u, dlogdet])


def _elementwise(z: Tensor, params: Tensor, transform: Transform) -> tuple[Tensor, Tensor]:
    """As the reference's, by the transforms' own kernels."""
    kind, *numbers = transform.form
    if kind == SPLINE:
        form = SplineForm(*numbers, *transform.constants)
        return _RationalQuadraticSpline.apply(z, params, None, None, None, form)
    return _AffineCoupling.apply(z, params, None, None, None, None, (*numbers, *transform.constants))


def _wanted(ctx, inputs) -> list[Tensor]:
    need = (ctx.needs_input_grad[0], *ctx.needs_input_grad[5:])
    return [t for t, n in zip(inputs, need, strict=True) if n]


def _gradients(outputs, inputs, cotangents, **options) -> list[Tensor | None]:
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if c is not None and o.requires_grad]
    if not pairs:
        return [None] * len(inputs)
    outputs, cotangents = zip(*pairs, strict=True)
    return list(torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True, **options))


def _grouped(layers: int, tensors) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:
    """Weights and biases of ``layers`` hidden layers and of the params, and the hidden layers' contexts."""
    n = layers + 1
    return list(tensors[:n]), list(tensors[n : 2 * n]), list(tensors[2 * n :])


# --- public ---------------------------------------------------------------------------------------------------------


def autoregressive_inverse(
    z: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    degrees: Degrees,
    *,
    context: Tensor | Sequence[Tensor | None] | None = None,
    activation: ActivationName = "relu",
    residual: Sequence[int] | None = None,
    final_activation: bool = True,
    transform: ScaleMap | Spline | str = "exp",
    order: OrderName = "scale_first",
    layout: PairName = "scale_shift",
    inverse: bool = True,
) -> tuple[Tensor, Tensor]:
    """x with ``z_i = f(x_i; p_i(x))``, where the params p come from a masked network of x: all passes in one kernel.

    The network is a chain of linear maps: ``v_1 = W_1 x + b_1``, ``v_l = W_l act(v_{l-1}) + b_l`` and, without an
    activation after it, the params ``p = W_{L+1} act(v_L) + b_{L+1}``. Each pass computes the units whose degree has
    its turn and no other, so all of them together cost what one evaluation of the network does.

    Args:
        z: ``[B, D]``, float32 or float64 (narrower data is computed in float32 and rounded once).
        weights: ``[H_1, D]``, ``[H_2, H_1]``, .. ``[D P, H_L]``: up to 8 hidden layers, then the params, feature-major:
            rows ``i P .. i P + P - 1`` are those of feature i. Floating point, cast to the arithmetic's type. Entries
            that the degrees mask are never read (their gradient is 0); a sparser mask is the caller's.
        biases: ``[H_l]`` each or None; one for each weight.
        degrees: what sees what; hidden units lie in the order of their degrees.
        context: added to the first hidden layer's ``v_1``: ``[B, H_1]``; or one entry for each hidden layer, ``[B,
            H_l]`` or None.
        activation: ``"relu"``, ``"leaky_relu"`` (slope 0.01), ``"elu"``, ``"silu"`` or ``"tanh"``.
        residual: per hidden layer the number, from 0, of an earlier one of the same degrees whose v is added to its
            own, or -1. ``(-1, -1, 0, -1, 2)`` are two residual blocks.
        final_activation: False: the params are ``W_{L+1} v_L + b_{L+1}``, as after residual blocks.
        transform: the elementwise f: a :class:`~nfkernels.ScaleMap` or the name of one of its presets (P = 2, or 1 if
            additive), or a :class:`~nfkernels.Spline` (P = ``params_per_element``).
        order: of affine maps. ``"scale_first"``: ``f = x s + t``; ``"shift_first"``: ``f = (x + t) s``.
        layout: of a feature's two params, of affine maps.
        inverse: False: ``x_i = f(z_i; p_i(x))``, for layers whose f leads from z to x.

    Returns:
        ``(x, logdet)``: x like z; logdet ``[B]`` of the map z -> x, float32 (float64 for float64 z).

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit; the sentence says which.

    Cost: O(B (D H + H^2 L + D P H)) / 2, once. Backward: one evaluation of the network and ``passes`` of its transposed
    products. Reference: Papamakarios et al. 2017 (Masked Autoregressive Flow), section 3.1; Germain et al. 2015 (MADE).
    """
    layers = len(degrees.hidden)
    contexts = [context, *[None] * (layers - 1)] if context is None or isinstance(context, Tensor) else list(context)
    residual = [-1] * layers if residual is None else list(residual)
    weights, biases = list(weights), list(biases)
    kind = int(_choice(Activation, activation, "activation"))
    options, per_feature = _transform(transform, order, layout, inverse)
    _check(z, weights, biases, contexts, degrees, residual, per_feature)
    dtype = compute_dtype(z)
    if z.dtype != dtype:
        x, logdet = autoregressive_inverse(
            z.to(dtype), weights, biases, degrees, context=contexts, activation=activation, residual=residual,
            final_activation=final_activation, transform=transform, order=order, layout=layout, inverse=inverse,
        )  # fmt: skip
        return x.to(z.dtype), logdet
    tensors = [None if t is None else t.to(dtype).contiguous() for t in (*weights, *biases, *contexts)]
    shape = Shape(degrees.passes, kind, residual, bool(final_activation))
    table = degrees.table(z)
    if under_transform():
        return reference.forward(z, *_grouped(layers, tensors), table, shape, options)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (z, *tensors)):
        # A trace cannot look into the Function's backward; nor does the reference, when it is asked for, need it.
        if torch.compiler.is_compiling() or forced_backend() == "reference":
            return reference.forward(z, *_grouped(layers, tensors), table, shape, options)
        return _AutoregressiveInverse.apply(canonical(z), table, shape, options, layers, *tensors)
    return _forward(canonical(z), *_grouped(layers, tensors), table, *shape, *options)


def _transform(transform: ScaleMap | Spline | str, order: str, layout: str, inverse: bool) -> tuple[Transform, int]:
    """The elementwise transform for the raw op, and how many params a feature has."""
    if layout not in ("scale_shift", "shift_scale"):
        raise ValueError(f"unknown layout {layout!r}: expected scale_shift or shift_scale")
    if isinstance(transform, Spline):
        spline = spline_form_of(transform, inverse, False)
        return Transform([SPLINE, *spline[:2]], list(spline[2:])), spline.count
    form, packed = form_of(transform, f"{layout}_interleaved", order, "none", inverse)
    return Transform([AFFINE, packed[0]], list(packed[1:])), 2 if form.map.has_scale else 1


def _check(z, weights, biases, contexts, degrees: Degrees, residual, per_feature: int) -> None:
    """Shapes, dtypes and devices; no data is read."""
    if z.dim() != 2:
        raise ValueError(f"z must be [B, D], got shape {tuple(z.shape)}")
    if z.dtype not in _FLOATS:
        raise ValueError(f"z must be floating point, got {z.dtype}")
    if z.shape[1] != len(degrees.features):
        raise ValueError(f"z has {z.shape[1]} features, but the degrees are those of {len(degrees.features)}")
    layers = len(degrees.hidden)
    if len(weights) != layers + 1 or len(biases) != layers + 1:
        raise ValueError(
            f"degrees of {layers} hidden layers go with {layers + 1} weights and as many biases (None for none), "
            f"got {len(weights)} and {len(biases)}"
        )
    for name, values in (("context", contexts), ("residual", residual)):
        if len(values) != layers:
            raise ValueError(f"{name} must have an entry for each of the {layers} hidden layers, got {len(values)}")
    widths = [z.shape[1], *map(len, degrees.hidden), z.shape[1] * per_feature]
    for i, weight in enumerate(weights):
        wanted = {f"weights[{i}]": (weight, (widths[i + 1], widths[i])), f"biases[{i}]": (biases[i], (widths[i + 1],))}
        if i < layers:
            wanted[f"context[{i}]"] = (contexts[i], (z.shape[0], widths[i + 1]))
        for name, (t, shape) in wanted.items():
            if t is None and name != f"weights[{i}]":
                continue
            if t.shape != shape:
                raise ValueError(f"{name} must be {list(shape)}, got {list(t.shape)}")
            if t.dtype not in _FLOATS:
                raise ValueError(f"{name} must be floating point, got {t.dtype}")
            if t.device != z.device:
                raise ValueError(f"{name} is on {t.device} but z is on {z.device}")
    for i, earlier in enumerate(residual):
        if earlier == -1:
            continue
        if not 0 <= earlier < i:
            raise ValueError(f"residual[{i}] must be -1 or the number of an earlier hidden layer, got {earlier}")
        if degrees.hidden[earlier] != degrees.hidden[i]:
            raise ValueError(f"hidden layers {earlier} and {i} are added: they must have the same degrees")
