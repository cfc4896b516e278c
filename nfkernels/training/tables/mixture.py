"""What a flow over a table is compared with: one Gaussian, and a mixture of them, conditional where the flow is."""

from __future__ import annotations

import dataclasses
import math
import warnings

import torch
from torch import Tensor

from ..data.image_data import need

COMPONENTS = (1, 2, 4, 8, 16, 32)
_MOST_ROWS = 20_000  # to fit on: enough for 32 covariances of ten columns, and a minute at most
_RIDGE = 1e-6  # added to variances of about 1, as scikit-learn does


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """Gaussians with full covariances over ``[D + C]`` columns, all float64: log weights ``[K]``, means ``[K, D + C]``
    and lower Cholesky factors ``[K, D + C, D + C]``."""

    log_weights: Tensor
    means: Tensor
    factors: Tensor

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``[N]`` in nats: of rows ``x [N, D]``, given contexts ``[N, C]`` where there are some (the joint density over
        that of the context, both in closed form)."""
        if context is None:
            return self._log_prob(x)
        # The context comes first, so that the leading block of a factor is the factor of the context's own covariance.
        count = context.shape[1]
        alone = Mixture(self.log_weights, self.means[:, :count], self.factors[:, :count, :count])
        return self._log_prob(torch.cat((context, x), 1)) - alone._log_prob(context)

    def _log_prob(self, x: Tensor) -> Tensor:
        parts = []
        for log_weight, mean, factor in zip(self.log_weights, self.means, self.factors, strict=True):
            z = torch.linalg.solve_triangular(factor, (x - mean).T, upper=False)
            norm = factor.diagonal().log().sum() + 0.5 * len(mean) * math.log(2 * math.pi)
            parts.append(log_weight - 0.5 * z.square().sum(0) - norm)
        return torch.stack(parts).logsumexp(0)


def gaussian(x: Tensor, context: Tensor | None = None) -> Mixture:
    """The Gaussian with mean and covariance of rows ``x [N, D]``, jointly with their context where there is one."""
    rows = _joint(x, context)
    centred = rows - rows.mean(0)
    covariance = centred.T @ centred / len(rows) + _RIDGE * torch.eye(rows.shape[1], dtype=rows.dtype)
    return Mixture(torch.zeros(1, dtype=rows.dtype), rows.mean(0)[None], torch.linalg.cholesky(covariance)[None])


def best_mixture(
    x: Tensor, context: Tensor | None, held_out: tuple[Tensor, Tensor | None], *, seed: int = 0
) -> tuple[Mixture, int, int]:
    """The mixture of 1, 2, 4 ... 32 Gaussians, fitted on rows by scikit-learn, that is best on held-out ones.

    Args:
        x, context: float64 ``[N, D]`` and ``[N, C]`` or None, of about unit variance. 20,000 rows at most are used.
        held_out: likewise.
        seed: of the rows and of the fits' starts.

    Returns:
        The mixture, its number of components, and the number of rows it was fitted on.

    Raises:
        DataError: scikit-learn is not installed.
    """
    sklearn = need("sklearn.mixture", "the Gaussian mixture that the flow is compared with")
    rows = _joint(x, context)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    rows = rows[order[:_MOST_ROWS]]
    best, chosen, loss, worse = gaussian(x, context), 1, math.inf, 0
    loss = float(-best.log_prob(*held_out).mean())
    for count in COMPONENTS[1:]:
        if count * 2 > len(rows) or worse == 2:
            break
        with warnings.catch_warnings():  # a fit that has not converged is a mixture like any other
            warnings.simplefilter("ignore")
            fitted = sklearn.GaussianMixture(count, reg_covar=_RIDGE, random_state=seed % 2**32).fit(rows.numpy())
        weights, means, covariances = (
            torch.from_numpy(part).double() for part in (fitted.weights_, fitted.means_, fitted.covariances_)
        )
        mixture = Mixture(weights.log(), means, torch.linalg.cholesky(covariances))
        now = float(-mixture.log_prob(*held_out).mean())
        best, chosen, loss, worse = (mixture, count, now, 0) if now < loss else (best, chosen, loss, worse + 1)
    return best, chosen, len(rows)


def _joint(x: Tensor, context: Tensor | None) -> Tensor:
    return x if context is None else torch.cat((context, x), 1)
