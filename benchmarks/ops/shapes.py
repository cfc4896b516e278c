"""The sizes every op is measured on, from launch-bound to 1 GB of float32 data, by kind of device."""

from __future__ import annotations

from ..case import EXTRA, HEADLINE, STANDARD, Case

# The headline of a GPU is about 100 MB, past any cache; that of a CPU is what Glow has on CIFAR at batch 64.
IMAGES = {
    "cuda": [
        ((128, 12, 128, 128), HEADLINE),
        ((16, 12, 8, 8), STANDARD),
        ((1024, 16, 128, 128), STANDARD),
        ((64, 12, 64, 64), STANDARD),
        ((64, 48, 16, 16), STANDARD),
        ((64, 12, 16, 16), EXTRA),
        ((512, 12, 128, 128), EXTRA),
    ],
    "cpu": [
        ((64, 48, 16, 16), HEADLINE),
        ((64, 12, 16, 16), STANDARD),
        ((64, 12, 64, 64), STANDARD),
        ((4, 12, 8, 8), EXTRA),
        ((128, 12, 128, 128), EXTRA),
    ],
    "quick": [((2, 4, 4, 4), HEADLINE)],
}
ROWS = {
    "cuda": [((1048576, 64), STANDARD), ((256, 16), STANDARD), ((65536, 64), EXTRA)],
    "cpu": [((4096, 64), HEADLINE), ((64, 16), EXTRA)],
    "quick": [((8, 6), STANDARD)],
}


def spread(op: str, directions, shapes, **options) -> list[Case]:
    """One case per direction and shape; a shape carries its importance."""
    return [Case(op, d, shape, importance=level, **options) for shape, level in shapes for d in directions]


def demoted(shapes, level: int = EXTRA):
    return [(shape, max(old, level)) for shape, old in shapes]


def only(shapes, level: int = HEADLINE):
    """The shapes of one importance."""
    return [(shape, old) for shape, old in shapes if old == level]
