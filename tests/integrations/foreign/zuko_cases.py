"""zuko's lazy layers and flows."""

from __future__ import annotations

from functools import partial

import torch
from zuko import transforms
from zuko.flows import MAF, NCSF, NICE, NSF
from zuko.flows.autoregressive import MaskedAutoregressiveTransform
from zuko.flows.coupling import GeneralCouplingTransform
from zuko.flows.gaussianization import ElementWiseTransform
from zuko.lazy import UnconditionalTransform

from . import Case

SMALL = {"hidden_features": (12, 12)}
# What is compiled in the case before it, or trained there.
ALIKE = "the same code as of another case"
QUICK = {"skip": {"compile": ALIKE}}
QUICKER = {"skip": {"compile": ALIKE, "train": ALIKE}}
PARTS = ("transform.transforms.0", "transform.transforms.1")
SPLINE = {"univariate": transforms.MonotonicRQSTransform, "shapes": [(5,), (5,), (4,)]}


def _there(module, x, context=None):
    return module(context).call_and_ladj(x)


def _back(module, out, x, context=None):
    return module(context).inv.call_and_ladj(out[0])


def _log_prob(module, x, context=None):
    return module(context).log_prob(x)


def _draws(module, out, x, context=None):
    torch.manual_seed(3)
    flow = module(context)
    return flow.rsample((2,)), *flow.rsample_and_log_prob(() if context is not None else (3,))


def _inputs(rows, features, context, spread):
    data = spread * torch.randn(*rows, features)
    return (data, torch.randn(*rows, context)) if context else (data,)


def _transform(name, make, context=0, rows=(7,), features=5, spread=2.5, **options):
    inputs = partial(_inputs, rows, features, context, spread)
    return Case(f"zuko.{name}", make, inputs, _there, _back, **options)


def _flow(name, make, context=0, features=5, spread=1.0, layers=("", "transform", *PARTS), **options):
    inputs = partial(_inputs, (7,), features, context, spread)
    return Case(f"zuko.{name}", make, inputs, _log_prob, _draws, layers=layers, **options)


CASES = [
    _transform("MaskedAutoregressive.affine", lambda: MaskedAutoregressiveTransform(5, **SMALL)),
    _transform(
        "MaskedAutoregressive.context",
        lambda: MaskedAutoregressiveTransform(
            5,
            3,
            order=torch.tensor([2, 0, 4, 1, 3]),
            univariate=partial(transforms.MonotonicAffineTransform, slope=0.1),
            **SMALL,
        ),
        context=3,
        **QUICK,
    ),
    _transform("MaskedAutoregressive.spline", lambda: MaskedAutoregressiveTransform(5, **SPLINE, **SMALL)),
    _transform(
        "MaskedAutoregressive.passes",
        lambda: MaskedAutoregressiveTransform(5, 2, passes=2, activation=torch.nn.ELU, **SPLINE, **SMALL),
        context=2,
        **QUICK,
    ),
    _transform(
        "MaskedAutoregressive.residual",
        lambda: MaskedAutoregressiveTransform(4, residual=True, **SMALL),
        features=4,
        **QUICKER,
    ),
    _transform(
        "MaskedAutoregressive.adjacency",
        lambda: MaskedAutoregressiveTransform(
            4, adjacency=torch.tensor([[1, 0, 0, 1], [1, 1, 0, 0], [1, 0, 1, 1], [0, 0, 0, 1]]).bool(), **SMALL
        ),
        features=4,
        **QUICKER,
    ),
    _transform(
        "MaskedAutoregressive.batches",
        lambda: MaskedAutoregressiveTransform(3, 2, **SMALL),
        context=2,
        rows=(2, 4),
        features=3,
        **QUICKER,
    ),
    _transform("GeneralCoupling.affine", lambda: GeneralCouplingTransform(5, **SMALL), **QUICKER),
    _transform(
        "GeneralCoupling.context",
        lambda: GeneralCouplingTransform(5, 3, mask=[True, False, False, True, True], **SMALL),
        context=3,
    ),
    _transform("GeneralCoupling.spline", lambda: GeneralCouplingTransform(4, **SPLINE, **SMALL), features=4, **QUICK),
    _transform(
        "GeneralCoupling.additive",
        lambda: GeneralCouplingTransform(5, univariate=transforms.AdditiveTransform, shapes=[()], **SMALL),
        **QUICK,
    ),
    _transform("ElementWise.affine", lambda: ElementWiseTransform(5), **QUICK),
    _transform("ElementWise.spline", lambda: ElementWiseTransform(5, **SPLINE), **QUICK),
    _transform("ElementWise.context", lambda: ElementWiseTransform(5, 3, **SPLINE, **SMALL), context=3),
    _transform(
        "LULinear",
        lambda: UnconditionalTransform(transforms.LULinearTransform, LU=torch.eye(5) + 0.2 * torch.randn(5, 5)),
    ),
    _transform(
        "Permutation",
        lambda: UnconditionalTransform(transforms.PermutationTransform, order=torch.randperm(5), buffer=True),
    ),
    _transform(
        "Rotation",
        lambda: UnconditionalTransform(transforms.RotationTransform, A=torch.randn(5, 5)),
        status="kept",
    ),
    _flow("MAF", lambda: MAF(5, transforms=2, randperm=True, **SMALL)),
    _flow("NSF", lambda: NSF(5, 3, transforms=2, bins=5, **SMALL), context=3, **QUICK),
    _flow("NSF.coupling", lambda: NSF(5, transforms=2, bins=5, passes=2, **SMALL), **QUICKER),
    _flow("NICE", lambda: NICE(5, 2, transforms=2, **SMALL), context=2, **QUICK),
    _flow(
        "NCSF",
        lambda: NCSF(4, transforms=2, bins=5, **SMALL),
        features=4,
        spread=0.9,  # data lies in [-pi, pi)
        layers=("transform", *PARTS),
        **QUICK,
    ),
]
