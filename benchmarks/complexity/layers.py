"""The table: every linear flow, how it is built for a size, the cost it is promised to have and the one it claims.

A sweep grows one size with the others fixed. ``promise`` is the bound it is held to, an exponent of that size (log: a
factor of its logarithm besides); ``claim`` is what the layer's algebra gives, never more. ``bound`` is the constant of
the counted operations: with 16 samples they stay below ``bound * claim(size)`` at every size from ``counted[0]`` on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import nn

from nfkernels import nn as flows

from . import peers
from .peers import Peer

ROWS = 16  # samples of a batch: a dependence on the size stays visible
LARGEST = 2**17  # elements of a sample: beyond, a batch outgrows caches, and curves of linear cost have a step


@dataclass(frozen=True)
class Cost:
    """``size^exponent``, with ``log`` times log2(size), and as people write it."""

    text: str
    exponent: float
    log: bool = False

    def at(self, size: float) -> float:
        return size**self.exponent * (math.log2(size) if self.log else 1.0)


@dataclass(frozen=True)
class Sweep:
    """One line of the table."""

    layer: str  # as it is called
    row: str  # of the promised table; "" where nothing was promised
    over: str  # the size that grows: d or c
    fixed: str  # what does not
    build: Callable[[int], nn.Module]
    shape: Callable[[int], tuple[int, ...]]  # of one sample
    inverse: tuple[Cost, Cost]  # promised, claimed
    logdet: tuple[Cost, Cost]
    bound: tuple[float, float]
    sizes: tuple[int, int]  # timed: powers of two between these, while a call takes a third of a second at most
    counted: tuple[int, ...]
    peers: dict[str, Callable[[int], Peer]] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.layer} over {self.over}"

    def powers(self) -> list[int]:
        least, most = (n.bit_length() - 1 for n in self.sizes)
        return [2**n for n in range(least, most + 1)]


ONE, C, C3 = Cost("1", 0), Cost("c", 1), Cost("c^3", 3)
D, D2, D3, DLOG = Cost("d", 1), Cost("d^2", 2), Cost("d^3", 3), Cost("d log d", 1, log=True)


def twice(cost: Cost) -> tuple[Cost, Cost]:
    """Promised and claimed."""
    return cost, cost


def image(size: int, channels: int) -> tuple[int, ...]:
    """``size = channels * height * width``, a power of two, as square as it gets."""
    pixels = (size // channels).bit_length() - 1
    return (channels, 2 ** (pixels // 2), 2 ** (pixels - pixels // 2))


def rows(layer: str, row: str, build, inverse, logdet, bound, others, fixed: str = "", sizes=(64, 8192)) -> Sweep:
    """A layer on ``[B, d]``, over d."""
    shape, counted = (lambda d: (d,)), (256, 512, 1024)
    return Sweep(layer, row, "d", fixed, build, shape, inverse, logdet, bound, sizes, counted, others)


def tables() -> list[Sweep]:
    """Layers on ``[B, d]``."""
    cubic, vector = (64, 4096), (64, LARGEST)
    blocks = Cost("c^3 d", 1), Cost("c^2 d", 1)
    wider = Cost("c^3 d", 3), Cost("c^2 d", 2)
    by_size = rows("BlockDiagonalLinear(d, 8)", "block diagonal", lambda d: flows.BlockDiagonalLinear(d, 8), blocks,
                   blocks, (360, 53), peers.blocks(8), "c = 8", vector)  # fmt: skip
    return [
        rows("FullLinear(d)", "full matrix", lambda d: flows.FullLinear(d), twice(D3), twice(D3), (2.2, 0.4),
             peers.FULL, sizes=cubic),
        rows("DiagonalLinear(d)", "diagonal", lambda d: flows.DiagonalLinear(d), twice(D), twice(D), (45, 3),
             peers.DIAGONAL, sizes=vector),
        rows("TriangularLinear(d)", "triangular", lambda d: flows.TriangularLinear(d), twice(D2), twice(D), (14, 3),
             peers.TRIANGULAR),
        by_size,
        replace(by_size, layer="BlockDiagonalLinear(1024, c)", over="c", fixed="d = 1024",
                build=lambda c: flows.BlockDiagonalLinear(1024, c), shape=lambda c: (1024,), inverse=wider,
                logdet=wider, bound=(3000, 500), sizes=(2, 512), counted=(32, 64, 128, 256),
                peers=peers.blocks_of(1024)),
        rows("LULinear(d)", "LU-factored", lambda d: flows.LULinear(d), twice(D2), twice(D), (30, 6), peers.LU),
        rows("QRLinear(d, 8)", "", lambda d: flows.QRLinear(d, 8), twice(D2), twice(D), (18, 3), peers.qr(8),
             "m = 8"),
        rows("QRLinear(d)", "", lambda d: flows.QRLinear(d), twice(D3), twice(D), (3.4, 3), peers.qr(None),
             "m = d", cubic),
        rows("HouseholderOrthogonal(d, 8)", "", lambda d: flows.HouseholderOrthogonal(d, 8), twice(Cost("m d", 1)),
             twice(ONE), (480, 4), peers.householder(8), "m = 8", vector),
        rows("HouseholderOrthogonal(d)", "", lambda d: flows.HouseholderOrthogonal(d), twice(Cost("m^2 d", 3)),
             twice(ONE), (3.3, 4), peers.householder(None), "m = d", cubic),
        rows("Permutation(d)", "", lambda d: flows.Permutation(d), twice(D), twice(ONE), (40, 40), peers.PERMUTATION,
             sizes=vector),
    ]  # fmt: skip


def mixes() -> list[Sweep]:
    """The 1x1 convolution: over its channels at 8 x 8 pixels, and over d at 16 channels. Factored, its log-determinant
    costs c; in groups everything is linear in c."""
    row, text, found = "1x1 convolution", "c^3 + c^2 d", []
    for kind, logdet, bound, fixed in (("plu", C, 5, 80), ("full", C3, 0.45, 2300), ("qr", C, 5, 80)):
        over_c = Sweep(f'InvertibleConv1x1(c, "{kind}")', row, "c", "8 x 8 pixels",
                       lambda c, kind=kind: flows.InvertibleConv1x1(c, kind), lambda c: (c, 8, 8), twice(Cost(text, 3)),
                       (C3, logdet), (24, bound), (8, 2048), (64, 128, 256, 512), peers.mixes(kind))  # fmt: skip
        over_d = replace(over_c, over="d", fixed="c = 16",
                         build=lambda d, kind=kind: flows.InvertibleConv1x1(16, kind), shape=lambda d: image(d, 16),
                         inverse=twice(Cost(text, 1)),
                         logdet=(replace(C3, exponent=0), replace(logdet, exponent=0)),
                         bound=(320, fixed), sizes=(2**10, LARGEST), counted=(2**12, 2**13, 2**14),
                         peers=peers.mixes_of(kind, 16))  # fmt: skip
        found += [over_c, over_d]
    groups = Sweep("InvertibleConv1x1(c, groups=c/8)", row, "c", "8 x 8 pixels",
                   lambda c: flows.InvertibleConv1x1(c, groups=c // 8), lambda c: (c, 8, 8),
                   (Cost(text, 3), Cost("8^2 c + 8 d", 1)), (C3, C), (10500, 5), (16, 2048),
                   (64, 128, 256, 512))  # fmt: skip
    return [*found, groups]


def convolutions() -> list[Sweep]:
    """Spatial ones: over d = c * pixels at 4 channels, and over the channels of 16 x 16 pixels."""
    row, cubes, solved = "spatial convolution", Cost("c^2 d", 3), Cost("k^2 (c^3 + c d)", 3)
    dense = Sweep("PeriodicConv2d(c)", row, "d", "3 x 3, c = 4", lambda d: flows.PeriodicConv2d(4),
                  lambda d: image(d, 4), twice(DLOG), twice(D), (110, 60), (2**8, LARGEST),
                  (2**14, 2**16, 2**18))  # fmt: skip
    over_c = replace(dense, over="c", fixed="3 x 3, 16 x 16 pixels", build=lambda c: flows.PeriodicConv2d(c),
                     shape=lambda c: (c, 16, 16), inverse=twice(cubes), logdet=twice(cubes), bound=(3000, 450),
                     sizes=(2, 256), counted=(16, 32, 64))  # fmt: skip
    line = replace(dense, layer="PeriodicConv1d(c)", fixed="3, c = 4", build=lambda d: flows.PeriodicConv1d(4),
                   shape=lambda d: (4, d // 4))  # fmt: skip
    return [
        dense,
        over_c,
        replace(dense, layer="PeriodicConv2d(c, depthwise)", build=lambda d: flows.PeriodicConv2d(4, depthwise=True)),
        line,
        replace(line, layer="PeriodicConv1d(c, depthwise)", build=lambda d: flows.PeriodicConv1d(4, depthwise=True)),
        replace(dense, layer="SymmetricConv(c)", build=lambda d: flows.SymmetricConv(4)),
        replace(dense, layer="EmergingConv2d(c)", build=lambda d: flows.EmergingConv2d(4), logdet=(D, ONE),
                inverse=(DLOG, replace(solved, exponent=1)), bound=(620, 18)),
        replace(over_c, layer="EmergingConv2d(c)", build=lambda c: flows.EmergingConv2d(c), inverse=twice(solved),
                logdet=(D, C), bound=(1300, 4.1), sizes=(4, 256), counted=(32, 64, 128)),
    ]  # fmt: skip


def sweeps(only: list[str] | None = None) -> list[Sweep]:
    """All of them, or those whose layer's name starts with one of ``only``."""
    found = [*tables(), *mixes(), *convolutions()]
    if not only:
        return found
    unknown = [n for n in only if not any(s.layer.startswith(n) for s in found)]
    if unknown:
        known = ", ".join(dict.fromkeys(s.layer.split("(")[0] for s in found))
        raise ValueError(f"no layer is called {unknown[0]}; there are: {known}")
    return [s for s in found if any(s.layer.startswith(n) for n in only)]
