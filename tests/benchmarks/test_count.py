"""Counted operations, against what a pencil gives."""

import pytest
import torch

from benchmarks.complexity.count import Counts, count
from nfkernels import channel_mix

A, B = torch.randn(4, 4) + 4 * torch.eye(4), torch.randn(4, 6)
LINES, HALF = torch.randn(3, 8), torch.randn(3, 5, dtype=torch.complex64)
IMAGES, KERNEL, PIXELS = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 3, 3), torch.randn(2, 4, 3, 3)
COMPLEX = A.to(torch.complex64)


@pytest.mark.parametrize(
    ("call", "operations"),
    [
        (lambda: A @ B, 4 * 4 * 6),
        (lambda: A @ B[:, 0], 16),
        (lambda: torch.einsum("bij,bjk->bik", A.expand(3, 4, 4), B.expand(3, 4, 6)), 3 * 96),
        (lambda: torch.addmm(B, A, B), 96 + 24),
        (lambda: COMPLEX @ COMPLEX, 4 * 64),
        (lambda: torch.linalg.solve_triangular(A, B, upper=True), 4 * 24 / 2),
        (lambda: torch.linalg.solve(A, B), 64 / 3 + 4 * 24),
        (lambda: torch.linalg.lu_factor(A), 64 / 3),
        (lambda: torch.linalg.inv(A), 64 / 3 + 64),
        (lambda: torch.fft.rfft(LINES), 3 * 2.5 * 8 * 3),
        (lambda: torch.fft.irfft(HALF, n=8), 3 * 2.5 * 8 * 3),
        (lambda: torch.fft.fft(COMPLEX), 4 * 5 * 4 * 2),
        (lambda: torch.nn.functional.conv2d(IMAGES, KERNEL), 2 * 5 * 36 * 27),
        (lambda: (A + 1).exp(), 32),
        (lambda: A[:, :1] + B, 24),  # broadcast
        (lambda: B.sum(1), 24),
        (lambda: channel_mix(PIXELS, A), 2 * 9 * 16),
    ],
    ids=range(17),
)
def test_operations(call, operations):
    assert count(call).operations == pytest.approx(operations)


def test_what_is_only_moved_is_told_apart():
    assert count(lambda: B.clone()).total == 24
    assert count(lambda: torch.cat([B, B])) == Counts(moved=48)
    assert count(lambda: B[:, torch.tensor([5, 0])]).moved == 8
    assert count(lambda: A.tril()) == Counts(moved=16)


def test_views_cost_nothing():
    assert count(lambda: B.t()[1:].unsqueeze(0).expand(5, 5, 4).diagonal(dim1=1, dim2=2)) == Counts()


def test_slogdet():
    assert 64 / 3 <= count(lambda: torch.linalg.slogdet(A)).operations <= 64 / 3 + 8


def test_an_unknown_operation_is_an_error():
    with pytest.raises(NotImplementedError, match=r"svd.* has no formula"):
        count(lambda: torch.linalg.svdvals(A))


def test_gradients_are_off():
    w = torch.randn(4, requires_grad=True)
    seen = []
    count(lambda: seen.append((w * 2).requires_grad))
    assert seen == [False]
