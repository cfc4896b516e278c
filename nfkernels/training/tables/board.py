"""`--tensorboard` of a run on a table: a histogram of each column's samples at each new best validation."""

from __future__ import annotations

from typing import Any

import torch

from ...nn import TableFlow
from ..progress import Reporter
from ..run_folder import RunFolder
from ..tensorboard import Board
from .columns import Table
from .draw import draw
from .report import modelled

_DRAWN, _COLUMNS = 2000, 32


class TableBoard(Board):
    """A ``Board`` for a flow over ``table``; samples of a conditional one are under the contexts of its test rows."""

    _kind = TableFlow

    def __init__(self, folder: RunFolder, device: torch.device, reporter: Reporter, table: Table) -> None:
        super().__init__(folder, device, reporter)
        context = table.test.context
        self._context = None if context is None else context[torch.arange(_DRAWN) % len(context)]

    def _add_samples(self, flow: TableFlow, config: dict[str, Any], step: int) -> None:
        samples = draw(flow, _DRAWN, self._context)
        for at, column in enumerate(modelled(flow)[:_COLUMNS]):
            self._writer.add_histogram(f"samples/{column['name']}", samples[:, at], step)
