"""How good a flow over a table is: nats and bits on held-out rows, beside a Gaussian and a mixture of Gaussians."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...nn.modes import evaluating
from ..evaluation import images_at_once, mean_and_error
from .columns import Rows, Table
from .mixture import best_mixture, gaussian

if TYPE_CHECKING:
    from ...nn import TableFlow

DRAWS = 20  # of the noise on whole numbers


@dataclasses.dataclass(frozen=True)
class Score:
    """A mean negative log-likelihood.

    Args:
        name: of the model.
        nats: per row, of the density in data units.
        error: the mean's standard error over rows.
        log_scale: what the change to standardised columns takes off: the sum of the logarithms of their scales.
        columns: how many.
    """

    name: str
    nats: float
    error: float
    log_scale: float
    columns: int

    @property
    def standardized(self) -> float:
        """Nats per row of the density of the standardised columns."""
        return self.nats - self.log_scale

    @property
    def bits(self) -> float:
        """Per dimension, in data units."""
        return self.nats / (self.columns * math.log(2))

    @property
    def standardized_bits(self) -> float:
        return self.standardized / (self.columns * math.log(2))


@dataclasses.dataclass(frozen=True)
class Report:
    """Scores of the flow and of what it is compared with, and the flow's mean lead over each with standard error."""

    rows: int
    draws: int
    flow: Score
    gaussian: Score
    mixture: Score
    components: int
    fitted_on: int
    train_rows: int
    leads: dict[str, tuple[float, float]]

    def facts(self) -> dict[str, Any]:
        """For ``metrics.jsonl``; what is not said to be standardised is in data units."""
        return {
            "test_nll": self.flow.nats,
            "test_standard_error": self.flow.error,
            "test_bits_per_dim": self.flow.bits,
            "test_nll_standardized": self.flow.standardized,
            "test_bits_per_dim_standardized": self.flow.standardized_bits,
            "gaussian_nll": self.gaussian.nats,
            "mixture_nll": self.mixture.nats,
            "mixture_components": self.components,
        }


def report(flow: TableFlow, table: Table, *, draws: int = DRAWS, seed: int = 0) -> Report:
    """The flow and its rivals, fitted on the flow's own training part, on the test part; all see the same noise."""
    draws = draws if flow.dequantizes else 1
    train, held_out = (_standardized(flow, part, noisy(flow, part, seed)) for part in (table.train, table.validation))
    single = gaussian(*train)
    mixture, components, fitted_on = best_mixture(*train, held_out, seed=seed)
    log_scale = log_scale_of(flow)
    sums = torch.zeros(3, len(table.test), dtype=torch.float64)
    for draw in range(draws):
        x = noisy(flow, table.test, seed + draw)
        standard = _standardized(flow, table.test, x)
        sums[0] -= log_prob(flow, x, table.test.context)
        for place, model in ((1, single), (2, mixture)):
            sums[place] -= model.log_prob(*standard) - log_scale
    losses = sums / draws
    given = "" if table.test.context is None else "conditional "
    names = ("this flow", f"{given}Gaussian", f"{given}mixture of {components}")
    scores = [Score(name, *mean_and_error(loss), log_scale, len(flow.names)) for name, loss in zip(names, losses)]
    leads = {score.name: mean_and_error(loss - losses[0]) for score, loss in zip(scores[1:], losses[1:])}
    own, full, mixed = scores
    return Report(len(table.test), draws, own, full, mixed, components, fitted_on, len(table.train), leads)


def nats_per_row(flow: TableFlow, rows: Rows, *, draws: int = DRAWS, seed: int = 0) -> Tensor:
    """The log-density of every row in data units, `[N]` float64: the mean over draws where there are whole numbers."""
    draws = draws if flow.dequantizes else 1
    total = torch.zeros(len(rows), dtype=torch.float64)
    for draw in range(draws):
        total += log_prob(flow, noisy(flow, rows, seed + draw), rows.context)
    return total / draws


def log_prob(flow: TableFlow, x: Tensor, context: Tensor | None) -> Tensor:
    """`[N]` float64 on the CPU, in chunks, on the flow's device."""
    device = flow.steps.device
    context = None if context is None else context.to(device)
    with evaluating(flow):
        size = images_at_once(x.shape[1:])
        return flow.log_prob(x.to(device), context, batch_size=size).to("cpu", torch.float64)


def log_scale_of(flow: TableFlow) -> float:
    """The sum over columns of ``log scale``: nats in data units are those of the standardised columns and this."""
    return sum(math.log(column["scale"]) for column in modelled(flow))


def modelled(flow: TableFlow) -> list[dict[str, Any]]:
    """The columns that a row of this flow holds."""
    return [column for column in flow.columns if column["kind"] != "constant" and not column["context"]]


def conditions(flow: TableFlow) -> list[dict[str, Any]]:
    """The columns that a context of this flow holds."""
    return [column for column in flow.columns if column["kind"] != "constant" and column["context"]]


def noisy(flow: TableFlow, rows: Rows, seed: int) -> Tensor:
    """The rows `[N, D]` with noise on whole numbers, drawn on the CPU."""
    if not flow.dequantizes:
        return rows.values
    steps = flow.steps.to("cpu", rows.values.dtype)
    u = torch.rand(rows.values.shape, generator=torch.Generator().manual_seed(seed), dtype=rows.values.dtype)
    return rows.values + (u - 0.5) * steps


def _standardized(flow: TableFlow, rows: Rows, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Float64, as the rivals see them."""

    def standard(values: Tensor, columns: list[dict[str, Any]]) -> Tensor:
        shift, scale = (torch.tensor([c[key] for c in columns], dtype=torch.float64) for key in ("shift", "scale"))
        return (values.double() - shift) / scale

    context = None if rows.context is None else standard(rows.context, conditions(flow))
    return standard(x, modelled(flow)), context
