"""``python -m benchmarks peers --sizes``: single layers on tables of many sizes, before and after, on the CPU.

What an adapter's ``pays_from`` says comes from here, and is left aside here: every size is swapped and timed.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import nfkernels
from nfkernels.integrations import Adapter

from ..record import Budget
from . import page
from .measure import QUICK, Pace, in_turns, version
from .run import Say, opened

SIZES = [(rows, columns) for columns in (4, 16, 64, 256) for rows in (64, 512, 4096)]
PACE = Pace(seconds=1.0, least=7, most=15)


def _relu(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, outputs))


def _freia(name: str, **options: Any) -> Callable[[int], nn.Module]:
    def make(columns: int) -> nn.Module:
        import FrEIA.modules

        return getattr(FrEIA.modules, name)([(columns,)], **options)

    return make


def _nflows(name: str) -> Callable[[int], nn.Module]:
    def make(columns: int) -> nn.Module:
        from nflows import transforms

        return getattr(transforms, name)(columns)

    return make


def _nflows_coupling(columns: int) -> nn.Module:
    from nflows.nn.nets import ResidualNet
    from nflows.transforms import AffineCouplingTransform

    mask = torch.arange(columns) % 2
    return AffineCouplingTransform(mask, lambda inputs, outputs: ResidualNet(inputs, outputs, 32))


def _normflows(name: str) -> Callable[[int], nn.Module]:
    def make(columns: int) -> nn.Module:
        from normflows import flows
        from normflows.nets import MLP

        mask = (torch.arange(columns) % 2).float()
        arguments = {
            "AffineCouplingBlock": lambda: (MLP([columns // 2, 32, columns]),),
            "MaskedAffineFlow": lambda: (mask, MLP([columns, 32, columns]), MLP([columns, 32, columns])),
        }
        return getattr(flows, name)(*arguments.get(name, lambda: (columns,))())

    return make


def _in_list(layer: nn.Module, x: Tensor) -> list[Tensor]:
    (y, *_), logdet = layer([x])
    return [y, torch.as_tensor(logdet)]


@dataclass(frozen=True)
class Layer:
    library: str
    name: str
    make: Callable[[int], nn.Module]
    call: Callable[[nn.Module, Tensor], Sequence[Tensor]] = lambda layer, x: layer(x)

    @property
    def id(self) -> str:
        return f"{self.library} {self.name}"


LAYERS = [
    Layer("FrEIA", "AllInOneBlock", _freia("AllInOneBlock", subnet_constructor=_relu), _in_list),
    Layer(
        "FrEIA", "AllInOneBlock, soft permutation",
        _freia("AllInOneBlock", subnet_constructor=_relu, permute_soft=True), _in_list,
    ),
    Layer("FrEIA", "GLOWCouplingBlock", _freia("GLOWCouplingBlock", subnet_constructor=_relu), _in_list),
    Layer("FrEIA", "RNVPCouplingBlock", _freia("RNVPCouplingBlock", subnet_constructor=_relu), _in_list),
    Layer("FrEIA", "ActNorm", _freia("ActNorm"), _in_list),
    Layer("nflows", "AffineCouplingTransform", _nflows_coupling),
    Layer("nflows", "LULinear", _nflows("LULinear")),
    Layer("nflows", "NaiveLinear", _nflows("NaiveLinear")),
    Layer("nflows", "ActNorm", _nflows("ActNorm")),
    Layer("normflows", "AffineCouplingBlock", _normflows("AffineCouplingBlock")),
    Layer("normflows", "MaskedAffineFlow", _normflows("MaskedAffineFlow")),
    Layer("normflows", "LULinearPermute", _normflows("LULinearPermute")),
    Layer("normflows", "InvertibleAffine", _normflows("InvertibleAffine")),
    Layer("normflows", "ActNorm", _normflows("ActNorm")),
]  # fmt: skip


@contextmanager
def any_size() -> Iterator[None]:
    with mock.patch.object(Adapter, "too_small", return_value=None):
        yield


def measure(layer: Layer, rows: int, columns: int, pace: Pace) -> dict[str, Any]:
    """One size: whether ``accelerate`` makes the swap, and how much a forward and a step would gain by it."""
    torch.manual_seed(0)
    x = torch.randn(rows, columns)
    before = layer.make(columns)
    with torch.no_grad():
        layer.call(before, x)  # what the first batch initialises
    after = copy.deepcopy(before)
    plan = nfkernels.accelerate(copy.deepcopy(before), x, call=layer.call)
    with any_size():
        forced = nfkernels.accelerate(after, x, call=layer.call)
    if forced.rows[0].status != "fused":
        raise RuntimeError(f"{layer.id} was kept: {forced.rows[0].reason}")

    def forward(of: nn.Module) -> None:
        with torch.no_grad():
            layer.call(of, x)

    def step(of: nn.Module) -> None:
        sum(t.sum() for t in layer.call(of, x.clone().requires_grad_())).backward()

    entry: dict[str, Any] = {"rows": rows, "columns": columns, "swapped": plan.rows[0].status == "fused"}
    for name, body in (("forward", forward), ("step", step)):
        entry[name] = in_turns([partial(body, of) for of in (before, after)], pace, x.device)
    return entry


def run(
    out: Path,
    *,
    quick: bool,
    names: Sequence[str],
    commit: str | None,
    seconds: float | None = None,
    minutes: float | None = None,
    say: Say = lambda line: print(line, flush=True),
) -> int:
    """Writes ``out/<device>/sizes-<date>-<commit>.json``; the exit status is 1 if a swap that is made is slower by more
    than 5 %, or a layer fails. ``names``: parts of layers' ids."""
    chosen = [layer for layer in LAYERS if not names or any(name in layer.id for name in names)]
    if not chosen:
        raise ValueError(f"there is no layer {', '.join(names)}; there are {', '.join(layer.id for layer in LAYERS)}")
    budget = Budget(minutes)
    saved = opened(out, "sizes", "layers", "cpu", commit, quick, budget, say)
    pace = QUICK if quick else PACE if seconds is None else replace(PACE, seconds=seconds)
    with saved.whole(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers' own deprecations
        for layer in chosen:
            entry: dict[str, Any] = {"id": layer.id, "library": layer.library, "status": "not reached"}
            if importlib.util.find_spec(layer.library) is None:
                entry |= {"status": "unavailable", "reason": f"{layer.library} is not installed"}
            elif budget.left() > 0:
                entry |= {"status": "measured", "version": version(layer.library)}
                try:
                    entry["sizes"] = [measure(layer, *size, pace) for size in (SIZES[:2] if quick else SIZES)]
                except Exception as error:
                    entry |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}
            saved.add(entry)
            say(f"{layer.id}: {entry['status']} {entry.get('reason', '')}".rstrip())
    entries = saved.data["layers"]
    say(f"\n{page.sizes_table(entries)}\n\n{saved.path}")
    found = page.sizes_problems(entries)
    found = [p for p in found if not (quick and "slower" in p)]  # on a quick run no time says anything
    for problem in found:
        say(f"PROBLEM: {problem}")
    return 1 if found else 0
