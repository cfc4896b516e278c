"""``flow.check``: clean on sound flows, and it names the layer that is not."""

from __future__ import annotations

import math

import pytest
import torch

from nfkernels import models
from nfkernels import nn as N


class WrongInverse(N.ActNorm):
    def inverse(self, z, context=None, *, lengths=None):
        x, logdet = super().inverse(z, context, lengths=lengths)
        return x + 0.01, logdet


class WrongLogdet(N.ActNorm):
    """Off by a hundredth in both directions, so that only the Jacobian can tell."""

    def _logdet(self, x, lengths):
        return super()._logdet(x, lengths) + 0.01


class WrongSign(N.ActNorm):
    def inverse(self, z, context=None, *, lengths=None):
        x, logdet = super().inverse(z, context, lengths=lengths)
        return x, -logdet


class Raises(N.ActNorm):
    def inverse(self, z, context=None, *, lengths=None):
        raise RuntimeError("no inverse today\nand more")


class NotFinite(N.ActNorm):
    def _logdet(self, x, lengths):
        return super()._logdet(x, lengths) + float("nan")


def flow_with(layer):
    chain = N.Chain(N.InvertibleConv1x1(3), layer, N.AffineCoupling(N.MLP(2, 4, 2)))
    with torch.no_grad():
        for p in chain.parameters():
            p.add_(0.2)
    return N.Flow(chain, N.StandardNormal(3))


def test_a_sound_flow():
    flow, x = flow_with(N.ActNorm(3)), torch.randn(5, 3)
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    report = flow.check(x)
    assert report.ok
    assert [row.kind for row in report.layers] == ["InvertibleConv1x1", "ActNorm", "AffineCoupling"]
    for row in (*report.layers, report.whole):
        assert row.round_trip < 1e-4
        assert row.logdet_jacobian < 1e-9
        assert 1 <= row.condition < 1e4
    *_, last = str(report).splitlines()
    assert "all 3 layers are well: the largest round-trip error in float32 is " in last
    worst = max(report.layers, key=lambda row: row.condition)
    assert last.endswith(f"the largest condition number {worst.condition:.1e} ({worst.name})")
    assert [flow.get_submodule(row.name) for row in report.layers] == list(flow.bijection)
    assert flow.training
    assert all(torch.equal(v, before[k]) for k, v in flow.state_dict().items()), "check leaves the flow as it is"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sound_flow_of_two_bytes(dtype):
    """Its inverse loses what the type cannot hold, which is no layer's fault."""
    torch.manual_seed(0)
    flow = models.NSF(4, layers=2, hidden=16).eval()
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.1 * torch.randn_like(p))
    report = flow.to(dtype).check(torch.randn(8, 4, dtype=dtype))
    assert report.ok, report


@pytest.mark.parametrize(
    ("layer", "problem"),
    [
        (WrongInverse, "its inverse does not undo it"),
        (WrongLogdet, "its log-determinant is not that of its Jacobian"),
        (WrongSign, "forward and inverse disagree on the log-determinant"),
        (Raises, "raised: no inverse today"),
        (NotFinite, "its log-determinant is not finite"),
    ],
)
def test_the_layer_at_fault_is_named(layer, problem):
    report = flow_with(layer(3)).check(torch.randn(5, 3))
    assert not report.ok
    assert report.faults[0].name == "bijection.layers.1"
    assert report.faults[0].kind == layer.__name__
    assert report.faults[0].problem.startswith(problem)
    assert f"at fault first: bijection.layers.1 ({layer.__name__}): {problem}" in str(report)
    assert [row.ok for row in report.layers] == [True, False, True]


def test_a_glow_with_classes_on_images():
    flow = models.Glow((1, 4, 4), levels=2, steps=1, hidden=4, classes=3, grey_levels=5, dropout=0.5)
    images, labels = torch.randint(0, 5, (4, 1, 4, 4), dtype=torch.uint8), torch.tensor([0, 1, 2, 0])
    flow.nll(images, labels)
    report = flow.check(images, labels)
    assert report.ok, str(report)
    assert [row.kind for row in report.layers] == [
        "Standardize", "Squeeze", "GlowSteps", "SplitPrior", "Squeeze", "GlowSteps", "DiagonalPrior",
    ]  # fmt: skip
    state = torch.random.get_rng_state()
    flow.check(images, labels)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_big_layers_skip_the_jacobian():
    flow = N.Flow(N.Chain(N.ActNorm(600), N.ActNorm(600)), N.StandardNormal(600))
    report = flow.check(torch.randn(2, 600))
    assert report.ok
    assert report.layers[0].condition != report.layers[0].condition
    assert " -  " in str(report)


def test_a_flow_of_one_layer_and_an_inverse():
    report = N.Flow(N.ActNorm(2), N.StandardNormal(2)).check(torch.randn(3, 2))
    assert report.ok
    assert [row.name for row in report.layers] == ["bijection"]
    assert "the layer is well: " in str(report)
    assert N.Flow(N.Inverse(N.Chain(N.ActNorm(2))), N.StandardNormal(2)).check(torch.randn(3, 2)).ok


class Step(N.Bijection):
    """Doubles; every test breaks one thing."""

    def forward(self, x, context=None, *, lengths=None):
        return 2 * x, self.logdet(x)

    def inverse(self, z, context=None, *, lengths=None):
        return z / 2, -self.logdet(z)

    def logdet(self, x):
        return x.new_full((x.shape[0],), x.shape[1] * math.log(2))


class CutGradient(Step):
    def forward(self, x, context=None, *, lengths=None):
        return 2 * x.detach(), self.logdet(x)


class CutPart(Step):
    def forward(self, x, context=None, *, lengths=None):
        return 2 * torch.cat([x[:, :1].detach(), x[:, 1:]], 1), self.logdet(x)


class ScalarLogdet(Step):
    def logdet(self, x):
        return super().logdet(x)[0]


class ColumnLogdet(Step):
    def logdet(self, x):
        return super().logdet(x)[:, None]


class DoubleLogdet(Step):
    def logdet(self, x):
        return super().logdet(x).to(torch.float64 if x.dtype == torch.float32 else torch.float32)


class OnlyFirstSampleRight(Step):
    def logdet(self, x):
        return super().logdet(x) + (torch.arange(x.shape[0]) > 0)


class DividesByZero(Step):
    def inverse(self, z, context=None, *, lengths=None):
        return 1 / 0


class ReturnsNothing(Step):
    def inverse(self, z, context=None, *, lengths=None):
        return None


class EmptyMessage(Step):
    def inverse(self, z, context=None, *, lengths=None):
        assert z is None


class NaNOutput(Step):
    def forward(self, x, context=None, *, lengths=None):
        return x * float("nan"), self.logdet(x)


class NaNInverse(Step):
    def inverse(self, z, context=None, *, lengths=None):
        return z * float("nan"), -self.logdet(z)


class InverseBroadcasts(Step):
    def inverse(self, z, context=None, *, lengths=None):
        return z[:, None] / 2, -self.logdet(z)


class Drops(Step):
    def forward(self, x, context=None, *, lengths=None):
        return x[:, :2], self.logdet(x)


@pytest.mark.parametrize(
    ("layer", "problem"),
    [
        (CutGradient, "its Jacobian is singular"),
        (CutPart, "its Jacobian is singular"),
        (ScalarLogdet, "its log-determinant has shape (), which should be (5,)"),
        (ColumnLogdet, "its log-determinant has shape (5, 1), which should be (5,)"),
        (DoubleLogdet, "its log-determinant is torch.float64, which should be torch.float32"),
        (OnlyFirstSampleRight, "its log-determinant is not that of its Jacobian (off by "),
        (DividesByZero, "raised: ZeroDivisionError: division by zero"),
        (ReturnsNothing, "raised: TypeError: "),
        (EmptyMessage, "raised: AssertionError"),
        (NaNOutput, "its output is not finite"),
        (NaNInverse, "its inverse is not finite"),
        (InverseBroadcasts, "its inverse returns shape (5, 1, 3) where its data had (5, 3)"),
        (Drops, "its output has shape (5, 2): not as many numbers as its input, (5, 3)"),
    ],
)
def test_what_a_broken_layer_may_do(layer, problem):
    report = N.Flow(N.Chain(N.ActNorm(3), layer(), N.ActNorm(3)), N.StandardNormal(3)).check(torch.randn(5, 3))
    assert [report.faults[0].name, report.faults[0].kind] == ["bijection.layers.1", layer.__name__]
    assert report.faults[0].problem.startswith(problem), report.faults[0].problem
    assert report.layers[0].ok


def singular(parametrization):
    layer = N.InvertibleConv1x1(3, parametrization)
    with torch.no_grad():
        getattr(layer, "weight" if parametrization == "full" else "log_s").fill_(
            {"full": 0, "plu": -200}[parametrization]
        )
    return layer


class RaisesForward(Step):
    def forward(self, x, context=None, *, lengths=None):
        return {}[0]


@pytest.mark.parametrize("layer", [singular("full"), singular("plu"), RaisesForward()])
def test_a_layer_that_no_data_comes_through_is_named(layer):
    chain = N.Chain(N.ActNorm(3), N.Chain(N.ActNorm(3), layer), N.ActNorm(3), N.ActNorm(3))
    report = N.Flow(chain, N.StandardNormal(3)).check(torch.randn(5, 3))
    names = [row.name.removeprefix("bijection.") for row in report.layers]
    assert names == ["layers.0", "layers.1.layers.0", "layers.1.layers.1"]
    assert [row.ok for row in report.layers] == [True, True, False]
    assert report.faults[0].problem.startswith("raised: ")
    assert str(report).endswith("not reached: bijection.layers.2, bijection.layers.3")


def test_what_raises_between_the_layers_is_told_and_bad_data_is_raised():
    class Adds(N.Chain):
        def forward(self, x, context=None, *, lengths=None):
            z, logdet = super().forward(x, context, lengths=lengths)
            return z + torch.zeros(2), logdet

    flow = N.Flow(Adds(N.ActNorm(3), N.ActNorm(3)), N.StandardNormal(3))
    report = flow.check(torch.randn(5, 3))
    assert [row.name for row in report.faults] == ["(whole)"]
    assert "must match the size" in report.faults[0].problem
    with pytest.raises(ValueError, match="NaN or infinite in sample 0"):
        flow.check(torch.full((2, 3), float("nan")))


def test_every_use_of_a_shared_layer_is_checked():
    shared = N.ActNorm(3)
    report = N.Flow(N.Chain(shared, Step(), shared), N.StandardNormal(3)).check(torch.randn(5, 3))
    assert [row.name for row in report.layers] == ["bijection.layers.0", "bijection.layers.1", "bijection.layers.2"]
    assert report.ok


def test_sequences_with_lengths():
    class Padded(N.Flow):
        def forward(self, x, context=None):
            return self.bijection(x, context, lengths=torch.tensor([4, 2, 6]))

    x = torch.randn(3, 2, 6) * (torch.arange(6) < torch.tensor([4, 2, 6])[:, None])[:, None]
    bijection = N.Chain(N.ActNorm(2), N.Squeeze(2), N.InvertibleConv1x1(4))
    with torch.no_grad():
        bijection[0].log_scale.fill_(0.3)
    report = Padded(bijection, N.StandardNormal((4, 3))).check(x)
    assert report.ok, str(report)
    assert report.whole.logdet_jacobian < 1e-9


def test_the_table_as_it_is_read():
    """A heading for each column, what the numbers mean below it, and the verdict last."""
    lines = str(flow_with(WrongInverse(3)).check(torch.randn(5, 3))).splitlines()
    heads = ["layer", "kind", "input", "round-trip error", "logdet fwd+inv", "logdet-Jacobian", "condition", "verdict"]
    assert [part.strip() for part in lines[0].split("  ") if part.strip()] == heads
    assert lines[1] == "-" * len(lines[1])
    starts = [lines[0].index(head) for head in heads]
    for line, kind in zip(lines[2:6], ("InvertibleConv1x1", "WrongInverse", "AffineCoupling", "Chain"), strict=True):
        cells = [line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
        assert cells[1:3] == [kind, "3"]
        assert all(cells)
    assert lines[2].endswith("  ok")
    assert all(head in "\n".join(lines[6:-1]) for head in heads[3:7]), "every number is explained"
    assert lines[-1].startswith("at fault first: bijection.layers.1 (WrongInverse): its inverse does not undo it")
    assert lines[-1].endswith("(1 more row is at fault)")
