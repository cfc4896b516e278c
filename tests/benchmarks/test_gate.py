"""The gate: what passes, what does not, and that it says why."""

import pytest
import torch

from benchmarks.gate import compare, same_bits


def outputs():
    torch.manual_seed(0)
    exact = [torch.randn(4, 6, 8, dtype=torch.float64), torch.randn(4, dtype=torch.float64)]
    return [t.float() for t in exact], exact


def test_plain_rounding_passes():
    plain, exact = outputs()
    verdict = compare(plain, plain, exact)
    assert verdict.ok
    assert 0 < verdict.error < 1e-6


def spoilt(kind):
    plain, _ = outputs()
    got = [t.clone() for t in plain]
    if kind == "one element off":
        got[0][1, 2, 3] += 1e-4
    elif kind == "a sum off":
        got[1] *= 1 + 1e-4
    elif kind == "not finite":
        got[0][0, 0, 0] = float("nan")
    elif kind == "another shape":
        got[1] = got[1][:3]
    elif kind == "another dtype":
        got[0] = got[0].double()
    elif kind == "one missing":
        got = got[:1]
    return got


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("one element off", "output 0: off by 0.0001"),
        ("a sum off", "output 1: off by"),
        ("not finite", "output 0 is not finite"),
        ("another shape", r"output 1 is torch.float32 \(3,\)"),
        ("another dtype", "output 0 is torch.float64"),
        ("one missing", "1 outputs where 2"),
    ],
)
def test_what_is_off_is_named(kind, reason):
    plain, exact = outputs()
    verdict = compare(spoilt(kind), plain, exact)
    assert not verdict.ok
    assert __import__("re").search(reason, verdict.reason)


def test_others_may_be_off_by_a_thousandth_of_the_norm():
    plain, exact = outputs()
    assert compare([t * (1 + 5e-4) for t in plain], plain, exact, ours=False).ok
    assert not compare([t * (1 + 2e-3) for t in plain], plain, exact, ours=False).ok


def test_infinities_where_they_belong_are_right():
    plain, exact = outputs()
    exact[0][0, 0, 0] = plain[0][0, 0, 0] = float("inf")
    assert compare(plain, plain, exact).ok
    assert not compare(spoilt("one element off"), plain, exact).ok


def test_empty_outputs():
    assert compare([torch.zeros(0, 3)], [torch.zeros(0, 3)], [torch.zeros(0, 3).double()]).ok


def test_same_bits_sees_the_last_bit_and_takes_nan_for_itself():
    a = torch.tensor([1.0, float("nan"), 0.0])
    assert same_bits([a], [a.clone()])
    assert not same_bits([a], [torch.tensor([1.0, float("nan"), -0.0])])
    assert not same_bits([a], [torch.nextafter(a, a + 1)])
