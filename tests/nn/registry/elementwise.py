"""One-dimensional changes of variables, and orders of the features."""

from __future__ import annotations

import torch

from nfkernels import nn as N

from .case import Case

CASES = [
    Case("exp", lambda: N.Exp(), (3, 4), latent="positive"),
    Case("exp-lengths", lambda: N.Exp(), (3, 2, 4), lengths=(4, 1, 0), latent="positive"),
    Case("log", lambda: N.Log(), (2, 3, 2), domain="positive"),
    Case("log-lengths", lambda: N.Log(), (2, 3, 4), lengths=(2, 3), domain="positive"),
    Case("softplus", lambda: N.Softplus(), (3, 4), latent="positive"),
    Case("softplus-inverse", lambda: N.Inverse(N.Softplus()), (2, 2, 2, 2), domain="positive"),
    Case("sigmoid", lambda: N.Sigmoid(), (3, 4), latent="unit"),
    Case("sigmoid-alpha", lambda: N.Sigmoid(0.05), (2, 1, 2, 3), latent="unit"),
    Case("logit", lambda: N.Logit(), (3, 4), domain="unit"),
    Case("logit-alpha", lambda: N.Logit(0.05), (2, 1, 2, 3), domain="unit"),
    Case("logit-lengths", lambda: N.Logit(), (2, 2, 3), lengths=(1, 3), domain="unit"),
    Case("tanh", lambda: N.Tanh(), (3, 4), latent="symmetric"),
    Case("arctanh", lambda: N.Arctanh(), (3, 2, 2), domain="symmetric"),
    Case("leaky-relu", lambda: N.LeakyReLU(0.2), (3, 4)),
    Case("affine", lambda: N.Affine(0.5, -2.0), (3, 4)),
    Case("affine-fixed-channels", lambda: N.Affine(torch.tensor([1.0, 2.0]), torch.tensor([0.5, -3.0])), (2, 2, 3)),
    Case(
        "affine-learned",
        lambda: N.Affine(torch.zeros(2, 1, 3), torch.tensor([[[1.0]], [[-2.0]]]), learned=True),
        (2, 2, 4, 3),
    ),
    Case("affine-learned-number", lambda: N.Affine(0.3, 2.0, learned=True), (2, 3)),
    Case("affine-learned-lengths", lambda: N.Affine(torch.zeros(3), 1.5, True), (2, 3, 4), lengths=(3, 0)),
    Case("permutation", lambda: N.Permutation(5), (3, 5)),
    Case("permutation-roll", lambda: N.Permutation(3, "roll"), (2, 3, 2, 2)),
    Case("permutation-lengths", lambda: N.Permutation(3, permutation=[2, 0, 1]), (2, 3, 4), lengths=(2, 4)),
]
