"""TableFlow: a flow over the columns of a table, in the table's own units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .bijection import Chain
from .config import Recorded
from .flow import Flow
from .standardize import Standardize, fit_to_sample


class TableFlow(Flow):
    """A flow over standardised columns that takes, and gives back, rows in data units.

    Args:
        flow: over the standardised columns, ``[D]``; its bijection and base become this flow's. A context that it takes
            is standardised likewise.
        columns: a dict for each column of the table, in the table's order: ``name``; ``kind``, which is ``"real"``,
            ``"integer"`` or ``"constant"``; ``context`` (whether it is a condition); and, where they are not constant,
            ``shift`` and ``scale`` in data units. Integers have a ``step``, the distance between neighbours, and an
            ``origin``, the value that they are so many steps away from; constants a ``value``.

    A row ``x [B, D]`` holds the columns that are neither constant nor context, in their order (:attr:`names`), a
    context ``[B, C]`` those that are context (:attr:`context_names`). ``log_prob`` is in nats per row, of a density in
    data units: of a column in other units it changes by the logarithm of the factor. A column of integers k stands for
    the interval of width ``step`` around k: add :meth:`noise` to it, as training does; the mean of ``log_prob`` over
    that noise, plus ``log(step)`` per such column, is then a lower bound on the logarithm of k's probability.

    Raises ``ValueError`` for a flow of another number of columns, and for a context that is missing.
    """

    bijection: Chain
    steps: Tensor

    def __init__(self, flow: Flow, columns: Sequence[dict[str, Any]]) -> None:
        used = [column for column in columns if column["kind"] != "constant"]
        data = [column for column in used if not column["context"]]
        conditions = [column for column in used if column["context"]]
        if tuple(flow.base.shape) != (len(data),):
            raise ValueError(f"a flow over {tuple(flow.base.shape)} does not fit {len(data)} columns of a table")
        embed = flow.embed
        if conditions:
            embed = StandardizedContext(*_numbers(conditions), flow.embed)
        super().__init__(Chain(StandardizedColumns(*_numbers(data)), flow.bijection), flow.base, embed=embed)
        self.names = [column["name"] for column in data]
        self.context_names = [column["name"] for column in conditions]
        self.dequantizes = any(column["kind"] == "integer" for column in data)
        steps = [column["step"] if column["kind"] == "integer" else 0.0 for column in data]
        self.register_buffer("steps", torch.tensor(steps, dtype=torch.float32))
        self._columns = [dict(column) for column in columns]

    @property
    def columns(self) -> list[dict[str, Any]]:
        """What the columns of the table are; see the class."""
        return [dict(column) for column in self._columns]

    @property
    def event_shape(self) -> tuple[int, ...]:
        """``(D,)``: the columns of a row."""
        return (len(self.names),)

    def noise(
        self, x: Tensor, *, generator: torch.Generator | None = None, rows: tuple[int, int] | None = None
    ) -> Tensor:
        """What makes the integers of rows ``x [B, D]`` continuous, in x's dtype: uniform on half a step to either side
        of each, 0 for real columns. With ``rows = (first, of)`` those of the rows from ``first`` on of a batch of
        ``of``, as in :meth:`ImageFlow.noise`.
        """
        first, of = (0, x.shape[0]) if rows is None else rows
        u = torch.rand(of, x.shape[1], generator=generator, device=x.device, dtype=x.dtype)[first : first + x.shape[0]]
        return (u - 0.5) * self.steps.to(x.dtype)

    def nll(
        self, x: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """The training loss in nats; ``noise`` is added to x first."""
        return super().nll(x if noise is None else x + noise, context, lengths=lengths)

    def sample_standardized(
        self, n: int, context: Tensor | None = None, *, temperature: float = 1.0, generator: Any = None
    ) -> Tensor:
        """Samples ``[n, D]`` before they go back to data units; ``context [n, C]`` has one entry per sample.

        For columns that float32 cannot hold: shift and scale are in :attr:`columns`, in double precision.
        """
        with torch.no_grad():
            z = self.base.sample(n, generator=generator, temperature=temperature)
            return self.bijection[1].inverse(z, self._embed(context, z))[0]

    def _embed(self, context: Tensor | None, like: Tensor) -> Tensor | None:
        count = len(self.context_names)
        if count and context is None:
            raise ValueError(f"this flow is conditioned on {', '.join(self.context_names)}: give them as context=")
        if count and (context.dim() < 2 or context.shape[-1] != count):
            raise ValueError(
                f"a context of this flow is [B, {count}] ({', '.join(self.context_names)}), got one of shape "
                f"{tuple(context.shape)}"
            )
        return super()._embed(context, like)


class StandardizedColumns(Standardize):
    """``Standardize`` with shifts in double precision: of Julian days float32 would be off by many deviations.

    What float32 leaves of a shift is a buffer of its own, which comes from the arguments and is in no file.
    """

    rest: Tensor

    def __init__(self, shift: Tensor, scale: Tensor) -> None:
        super().__init__(shift, scale)
        self.register_buffer("rest", _rest(shift), persistent=False)

    def _fit(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        shift, scale, mask = super()._fit(x, lengths)
        return shift + fit_to_sample(self.rest, x, "Standardize", "shift"), scale, mask


class StandardizedContext(Recorded, nn.Module):
    """Contexts ``[B, C]`` in data units to what the conditioners see: ``(c - shift) / scale``, then ``embed``.

    The shift is in double precision, as that of the columns.
    """

    shift: Tensor
    rest: Tensor
    scale: Tensor

    def __init__(self, shift: Tensor, scale: Tensor, embed: nn.Module | None = None) -> None:
        super().__init__()
        self.register_buffer("shift", shift.float().clone())
        self.register_buffer("rest", _rest(shift), persistent=False)
        self.register_buffer("scale", scale.float().clone())
        self.embed = embed

    def forward(self, context: Tensor) -> Tensor:
        dtype = torch.promote_types(context.dtype, self.shift.dtype)
        shift = self.shift.to(dtype) + self.rest.to(dtype)
        context = ((context.to(dtype) - shift) / self.scale.to(dtype)).to(self.shift.dtype)
        return context if self.embed is None else self.embed(context)


def _rest(shift: Tensor) -> Tensor:
    return (shift.double() - shift.float().double()).float()


def _numbers(columns: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    numbers = ([column[key] for column in columns] for key in ("shift", "scale"))
    shift, scale = (torch.tensor(each, dtype=torch.float64) for each in numbers)
    return shift, scale
