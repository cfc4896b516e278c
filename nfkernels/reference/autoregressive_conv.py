"""Autoregressive convolution in plain PyTorch: ``y_p = W_0 x_p + sum_t W_t x_{p - t} + b``, earlier pixels p - t.

``W_0`` is triangular, so the map is. Its inverse ``x_p = W_0^-1 (y_p - bias) - sum_t (W_0^-1 W_t) x_{p - t}`` is again
products of small matrices, one wavefront of pixels after another: those with the same ``w + skew h`` need none of each
other. Hoogeboom, van den Berg & Welling 2019 (Emerging Convolutions), section 3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .affine_coupling import compute_dtype
from .lu_compose import exact_dtype, no_autocast


class Form(NamedTuple):
    """The kernel's size and which of its taps there are; the ops take it unpacked."""

    rows: int
    columns: int
    raster: bool  # else square
    reverse: bool  # pixels look at later ones

    def offsets(self) -> list[tuple[int, int]]:
        """``t`` of every tap, the pixel itself first. Tap t of the kernel reads x at p - t (p + t if reverse)."""
        half_h, half_w = self.rows // 2, self.columns // 2
        if self.raster:
            places = range(half_h * self.columns + half_w + 1)
            return [((i + half_w) // self.columns, (i + half_w) % self.columns - half_w) for i in places]
        return [(h, w) for h in range(half_h + 1) for w in range(half_w + 1)]

    def skew(self) -> int:
        """``w + skew h`` grows by at least 1 along every offset."""
        return self.columns // 2 + 1 if self.raster else 1

    def flipped(self) -> Form:
        return self._replace(reverse=not self.reverse)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, form: Form, solve: bool) -> Tensor:
    """``out_p = W_0 x_p + sum_t W_t s_{p - t} + bias``, with s the input, or the output itself where ``solve``.

    ``weight [taps, C, C]`` in the arithmetic's type; the result in x's.
    """
    with no_autocast(x.device.type):
        wide = x.to(compute_dtype(x))
        return (_recursion if solve else _product)(wide, weight, bias, form).to(x.dtype)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, form: Form) -> Tensor:
    y = None
    for i, tap in enumerate(form.offsets()):
        if (moved := shifted(x, tap, form.reverse)) is not None:
            term = torch.matmul(weight[i], moved.flatten(2))
            y = term if y is None else y + term
    return (y if bias is None else y + bias[:, None]).reshape(x.shape)


def _recursion(x: Tensor, weight: Tensor, bias: Tensor | None, form: Form) -> Tensor:
    if form.reverse:
        return _recursion(x.flip(2, 3), weight, bias, form.flipped()).flip(2, 3)
    height, width, skew = x.shape[2], x.shape[3], form.skew()
    given = torch.matmul(weight[0], x.flatten(2))
    given = (given if bias is None else given + bias[:, None]).reshape(x.shape)
    if x.numel() == 0:
        return given
    steps = width + skew * (height - 1)
    time = torch.arange(steps, device=x.device) - skew * torch.arange(height, device=x.device)[:, None]
    inside = (time >= 0) & (time < width)
    given = _sheared(given, skew, steps)
    taps = [(i, h, skew * h + w) for i, (h, w) in enumerate(form.offsets()) if i > 0 and h < height]
    fronts: list[Tensor] = []
    for step in range(steps):
        front = given[..., step]
        earlier = [(i, h, step - ago) for i, h, ago in taps if ago <= step]
        if earlier:
            sources = [F.pad(fronts[at][..., : height - h], (h, 0)) for _, h, at in earlier]
            matrix = torch.cat([weight[i] for i, _, _ in earlier], 1)
            front = torch.where(inside[:, step], front + torch.matmul(matrix, torch.cat(sources, 1)), 0.0)
        fronts.append(front)
    return _unsheared(torch.stack(fronts, 3), skew, width)


def _sheared(x: Tensor, skew: int, steps: int) -> Tensor:
    """``[B, C, H, W]`` to ``[B, C, H, steps]``: row h moved right by skew h, zeros around it."""
    height = x.shape[2]
    flat = F.pad(x, (0, steps + skew - x.shape[3])).flatten(2)
    return flat[..., : height * steps].reshape(*x.shape[:3], steps)


def _unsheared(x: Tensor, skew: int, width: int) -> Tensor:
    height, steps = x.shape[2:]
    return F.pad(x.flatten(2), (0, height * skew)).reshape(*x.shape[:3], steps + skew)[..., :width]


def shifted(x: Tensor, tap: tuple[int, int], reverse: bool) -> Tensor | None:
    """x at p - tap (p + tap if reverse) for every pixel p, zero outside the image; None where that is everywhere."""
    h, w = (-tap[0], -tap[1]) if reverse else tap
    if abs(h) >= x.shape[2] or abs(w) >= x.shape[3]:
        return None if h or w else x
    return F.pad(x, (w, -w, h, -h)) if h or w else x


def weight_gradient(dy: Tensor, x: Tensor, form: Form) -> Tensor:
    """``dW_t = sum_p dy_p x_{p - t}^T``, ``[taps, C, C]``, in the arithmetic's type; differentiable itself."""
    dtype = compute_dtype(x)
    with no_autocast(x.device.type):
        x = x.to(dtype)
        rows_dy = dy.to(dtype).transpose(0, 1).flatten(1)
        grads = []
        for tap in form.offsets():
            moved = shifted(x, tap, form.reverse)
            if moved is None:
                grads.append(x.new_zeros(x.shape[1], x.shape[1]))
            else:
                grads.append(rows_dy @ moved.transpose(0, 1).flatten(1).t())
        return torch.stack(grads)


def premultiplied(weight: Tensor, bias: Tensor | None, form: Form) -> tuple[Tensor, Tensor | None]:
    """What :func:`forward` takes to solve: ``(W_0^-1, -W_0^-1 W_t), -W_0^-1 bias``.

    Differentiable. Made in float64 where the device has it: its rounding is then the inverse matrix's only error.
    """
    exact, channels, dtype = exact_dtype(weight), weight.shape[1], weight.dtype
    with no_autocast(weight.device.type):
        wide = weight.to(exact)
        columns = [torch.eye(channels, dtype=exact, device=weight.device), *(-wide[1:]).unbind()]
        columns += [] if bias is None else [-bias.to(exact)[:, None]]
        solved = torch.linalg.solve_triangular(wide[0], torch.cat(columns, 1), upper=form.reverse).to(dtype)
    count = channels * weight.shape[0]
    stack = solved[:, :count].reshape(channels, weight.shape[0], channels).transpose(0, 1).contiguous()
    return stack, None if bias is None else solved[:, count].contiguous()
