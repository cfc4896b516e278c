"""The package's own random numbers: keys that live on the device, and the generator by itself."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from ..reference import philox
from ._layout import canonical
from ._library import define, under_transform
from .affine_coupling import _like

# --- raw op: schema, reference, fake --------------------------------------------------------------------------------


def _composite_forward(like, key):
    return _like(philox.uniform(like.shape, key, like.dtype), like)


def _fake_forward(like, key):
    return torch.empty_like(like)


_forward = define(
    "_philox_uniform_forward",
    "(Tensor like, Tensor key) -> Tensor",
    reference=_composite_forward,
    fake=_fake_forward,
)


# --- public ---------------------------------------------------------------------------------------------------------


def random_key(seed: int, device: torch.device | str | None = None) -> Tensor:
    """A key ``[seed, 0]``, int64, on ``device``: what ops that draw random numbers are given.

    The second number, the offset, counts calls: every call needs a key of its own, and :func:`advance_` makes the next
    one. Calls with different offsets (or seeds) never share a draw, however many elements they have.

    Raises ``ValueError`` for a seed that no int64 holds.
    """
    seed = operator.index(seed)
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"a seed is an int64, got {seed}")
    return torch.tensor([seed, 0], dtype=torch.int64, device=device)


def advance_(key: Tensor, by: int = 1) -> Tensor:
    """Adds ``by`` to the offset of a key, int64 ``[2]``, in place and on its device, and returns it.

    Nothing waits for the device, and a CUDA graph that holds this call draws anew in every replay. Raises
    ``ValueError`` for what is no key.
    """
    check_key(key, key.device)
    key.narrow(0, 1, 1).add_(by)
    return key


def philox_uniform(like: Tensor, key: Tensor) -> Tensor:
    """Uniform numbers in ``[0, 1)``, multiples of ``2**-24``: shaped and laid out like ``like``, the same everywhere.

    Args:
        like: float32 or float64, any shape and layout; its values are not read.
        key: int64 ``[seed, offset]`` on the same device (:func:`random_key`).

    Returns:
        A tensor like ``like``. Element i, counted in logical order, depends on i and the key alone: not on the
        device, the backend, the strides, the dtype or the number of threads. (Under ``torch.vmap`` every example counts
        from zero: give each its own key.)

    Raises:
        ValueError: dtypes, shapes or devices do not fit.

    Reference: Salmon et al. 2011, Philox4x32-10.
    """
    if like.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"uniform numbers are float32 or float64, got {like.dtype}")
    check_key(key, like.device)
    like = like.detach()
    if under_transform():
        return philox.uniform(like.shape, key, like.dtype)
    # The kernels see [B, C, P]; fewer axes are one sample.
    given = canonical(like) if like.dim() >= 2 else like.reshape(1, -1)
    return _forward(given, key.contiguous()).reshape(like.shape)


def check_key(key: Tensor, device: torch.device) -> None:
    if key.dtype != torch.int64 or key.shape != (2,):
        raise ValueError(
            f"a key is int64 [seed, offset], as nfkernels.ops.random_key makes it; got {key.dtype} {tuple(key.shape)}"
        )
    if key.device != device:
        raise ValueError(f"key is on {key.device} but the data is on {device}")
