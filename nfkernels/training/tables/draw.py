"""Samples of a flow over a table, as the table itself has them: all columns, whole numbers whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from .columns import Rows, Table, wrapped
from .report import conditions, modelled

if TYPE_CHECKING:
    from ...nn import TableFlow

_AT_ONCE = 16_384
_DRAWN = 10_000  # rows of data, and samples, in a corner plot


def draw(
    flow: TableFlow, count: int, context: Tensor | None = None, *, temperature: float = 1.0, seed: int = 0
) -> numpy.ndarray:
    """float64 ``[count, D]`` in data units, whole numbers rounded; ``context [count, C]`` has one entry per sample.

    Raises ``ValueError`` where what comes out is not finite.
    """
    device = flow.steps.device
    generator = torch.Generator(device).manual_seed(seed)
    parts = []
    for start in range(0, count, _AT_ONCE):
        size = min(_AT_ONCE, count - start)
        given = None if context is None else context[start : start + size].to(device)
        z = flow.sample_standardized(size, given, temperature=temperature, generator=generator)
        parts.append(z.to("cpu", torch.float64))
    columns = modelled(flow)
    shift, scale = (numpy.array([column[key] for column in columns]) for key in ("shift", "scale"))
    # In double precision from here on: of large numbers float32 would keep too few digits.
    values = torch.cat(parts).numpy() * scale + shift
    wrong = int((~numpy.isfinite(values)).any(1).sum())
    if wrong:
        raise ValueError(
            f"{wrong} of {count} samples are not finite: expected conditions like those in the table, a trained flow"
        )
    for at, column in enumerate(columns):
        if column["kind"] == "integer":
            values[:, at] = rounded(values[:, at], column)
        if "period" in column:  # the last number rounds to the first
            values[:, at] = wrapped(values[:, at], column["shift"] - column["period"] / 2, column["period"])
    return values


def rounded(values: numpy.ndarray, column: dict[str, Any]) -> numpy.ndarray:
    return numpy.round((values - column["origin"]) / column["step"]) * column["step"] + column["origin"]


def whole_rows(flow: TableFlow, values: numpy.ndarray, context: numpy.ndarray | None) -> dict[str, numpy.ndarray]:
    """Every column of the table by name, in its order: samples ``[N, D]``, their context ``[N, C]``, constants."""
    data = iter(values.T)
    given = iter(() if context is None else context.T)
    rows = {}
    for column in flow.columns:
        if column["kind"] == "constant":
            rows[column["name"]] = numpy.full(len(values), column["value"])
        else:
            rows[column["name"]] = next(given if column["context"] else data)
    return rows


def corner_rows(flow: TableFlow, table: Table, seed: int = 0) -> dict[str, Any]:
    """What ``nfkernels.plot.corner`` draws: rows of all parts, as many samples (under the contexts of these rows), the
    columns' names and the steps of whole numbers. Conditions come last, equal in both."""
    values, context = _some(table, seed)
    samples = draw(flow, len(values), context, seed=seed)
    data = values.double().numpy()
    names = [column["name"] for column in modelled(flow)]
    steps = [column.get("step", 0.0) for column in modelled(flow)]
    if context is not None:
        given = context.double().numpy()
        data, samples = (numpy.concatenate((part, given), 1) for part in (data, samples))
        names += [f"{column['name']} (given)" for column in conditions(flow)]
        steps += (given == numpy.round(given)).all(0).astype(float).tolist()
    return {"data": data, "samples": samples, "names": names, "steps": steps}


def _some(table: Table, seed: int) -> tuple[Tensor, Tensor | None]:
    parts: list[Rows] = [table.train, table.validation, table.test]
    values = torch.cat([part.values for part in parts])
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))[:_DRAWN]
    if table.test.context is None:
        return values[order], None
    return values[order], torch.cat([part.context for part in parts])[order]
