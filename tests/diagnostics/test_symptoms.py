"""``diagnose``: silent on sound flows, new and trained, and every planted fault is named where it is."""

from __future__ import annotations

import pytest
import torch

from nfkernels import ScaleMap, Spline, models
from nfkernels import nn as N
from nfkernels.diagnostics import diagnose

GENERATOR = torch.Generator().manual_seed(0)
ROWS = torch.randn(64, 4, generator=GENERATOR)
IMAGES = torch.randint(0, 17, (64, 1, 8, 8), generator=GENERATOR, dtype=torch.uint8)


def glow(**how):
    torch.manual_seed(0)
    flow = models.Glow((1, 8, 8), levels=2, steps=3, hidden=8, grey_levels=17, **how)
    flow.nll(IMAGES, torch.arange(64) % 3 if how.get("classes") else None)
    return flow


def realnvp(scale_map="realnvp"):
    torch.manual_seed(0)
    layers = [N.AffineCoupling(N.MLP(2, 16, 4), scale_map=scale_map, identity=s) for s in ("first", "second") * 2]
    return N.Flow(N.Chain(N.ActNorm(4), *layers), N.StandardNormal(4))


FLOWS = {
    "Glow": (glow, IMAGES),
    "Glow with a learned dequantisation": (lambda: glow(dequantization="variational"), IMAGES),
    "RealNVP": (lambda: models.RealNVP(4), ROWS),
    "NSF": (lambda: models.NSF(4), ROWS),
    "autoregressive NSF": (lambda: models.NSF(4, coupling=False), ROWS),
    "MAF": (lambda: models.MAF(4), ROWS),
    "IAF": (lambda: models.IAF(4), ROWS),
}


@pytest.mark.parametrize("name", FLOWS)
def test_sound_flows_new_and_trained(name):
    build, data = FLOWS[name]
    flow = build()
    assert diagnose(flow, data) == []
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        flow.nll(data).backward()
        optimizer.step()
    assert [str(finding) for finding in diagnose(flow, data)] == []


def test_classes_and_that_nothing_is_touched():
    flow = glow(classes=3, dropout=0.3).train()
    before, state = {k: v.clone() for k, v in flow.state_dict().items()}, torch.random.get_rng_state()
    assert diagnose(flow, IMAGES, torch.arange(64) % 3) == []
    assert flow.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in flow.state_dict().items())


def only(flow, x):
    found = diagnose(flow, x)
    assert len(found) == 1, [str(finding) for finding in found]
    assert ";" in str(found[0])
    return found[0]


def test_a_layer_with_a_huge_scale():
    flow = realnvp()
    diagnose(flow, ROWS)
    with torch.no_grad():
        flow.bijection[0].log_scale.fill_(20.0)
    found = only(flow, ROWS)  # and not what follows from it
    assert (found.kind, found.layer) == ("exploding", "bijection.layers.0")
    assert "the scales of bijection.layers.0 (ActNorm) explode: a factor of e^20 " in str(found)
    assert "--lr" in str(found)


def test_an_unbounded_coupling_that_explodes():
    flow = realnvp("exp")
    with torch.no_grad():
        flow.bijection[2].conditioner.last.bias[2:].fill_(25.0)
    found = diagnose(flow, ROWS)
    assert (found[0].kind, found[0].layer) == ("exploding", "bijection.layers.2")


@pytest.mark.parametrize(
    "scale_map",
    [ScaleMap("tanh", clamp=1.0), ScaleMap("atan", clamp=1.0), ScaleMap("softclip", clamp=2.0), "glow"],
    ids=["tanh", "atan", "softclip", "sigmoid"],
)
def test_saturated_scales(scale_map):
    flow = realnvp(scale_map)
    with torch.no_grad():
        flow.bijection[3].conditioner.last.bias[2:].fill_(1000.0)
    found = only(flow, ROWS)
    kind = "sigmoid" if scale_map == "glow" else scale_map.kind
    assert (found.kind, found.layer) == ("saturated", "bijection.layers.3")
    assert f"100% of the scales of bijection.layers.3 (AffineCoupling) are saturated: they sit on the flat part of its {kind} map" in str(found)  # noqa: E501  # fmt: skip


def test_saturated_by_data_that_is_far_too_large():
    flow = realnvp(ScaleMap("tanh", clamp=1.0))
    with torch.no_grad():
        for layer in flow.bijection[1:]:
            layer.conditioner.last.weight.normal_(generator=GENERATOR)
    assert diagnose(flow, ROWS) == []
    found = diagnose(flow, 1e6 * ROWS)
    assert {finding.kind for finding in found} == {"saturated"}
    assert "e+06: standardise the data, or try a lower" in found[0].advice


def test_one_saturated_step_of_many():
    flow = glow(scale_map=ScaleMap("tanh", clamp=1.0))
    steps = flow.get_submodule("bijection.layers.1.levels.0.layers.1")
    with torch.no_grad():  # the second of three steps; raw scales are the second half of its channels
        width = steps.bias3.numel() // 3
        steps.bias3[width + width // 2 : 2 * width] = 100.0
    found = only(flow, IMAGES)
    assert found.layer == "bijection.layers.1.levels.0.layers.1"
    assert "(GlowSteps), coupling 2 are saturated" in str(found)


def test_data_outside_of_a_spline():
    flow = N.Flow(N.Chain(N.MaskedAutoregressive(4, transform=Spline(bins=4, low=-3, high=3))), N.StandardNormal(4))
    assert diagnose(flow, ROWS) == []
    found = only(flow, 100 * ROWS)
    assert (found.kind, found.layer) == ("outside", "bijection.layers.0")
    assert "lies outside of its interval" in str(found)


class Constant(N.Bijection):
    """Scales what leaves at this level: by so little, or so much, that nothing of the data is left in it."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x, context=None, *, lengths=None):
        return x * self.factor, x.new_zeros(len(x))

    def inverse(self, z, context=None, *, lengths=None):
        return z / self.factor, z.new_zeros(len(z))


@pytest.mark.parametrize(
    ("factor", "how"), [(1e-4, "do not change with the data"), (1e4, "are far wider than their prior")]
)
def test_a_level_whose_latents_are_dead(factor, how):
    flow = glow()
    flow.get_submodule("bijection.layers.1.levels.1").layers.append(Constant(factor))
    found = only(flow, IMAGES)
    assert (found.kind, found.layer) == ("dead level", "bijection.layers.1.levels.1")
    assert f"level 2 is dead: the latents of bijection.layers.1.levels.1 {how}" in str(found)


class Ignores(N.Bijection):
    """Its inverse does not look at what comes from the latents."""

    def forward(self, x, context=None, *, lengths=None):
        return x, x.new_zeros(len(x))

    def inverse(self, z, context=None, *, lengths=None):
        return z * 0, z.new_zeros(len(z))


def test_a_level_that_samples_do_not_use():
    flow = glow()
    flow.get_submodule("bijection.layers.1.levels.1").layers.append(Ignores())
    found = only(flow, IMAGES)
    assert (found.kind, found.layer) == ("dead level", "bijection.layers.1.levels.1")
    assert "samples do not change with the latents of bijection.layers.1.levels.1" in str(found)


class Breaks(N.Bijection):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x, context=None, *, lengths=None):
        if self.how == "raises":
            raise ValueError("a matrix is singular")
        return x * float(self.how), x.new_zeros(len(x))


def test_the_first_layer_that_is_not_finite():
    flow = realnvp()
    flow.bijection.layers.insert(2, Breaks("nan"))
    found = only(flow, ROWS)
    assert (found.kind, found.layer) == ("not finite", "bijection.layers.2")
    assert "the output of bijection.layers.2 (Breaks) is not finite (its input is, up to" in str(found)


def test_what_overflows_names_the_layer_that_made_it_large():
    flow = realnvp()
    diagnose(flow, ROWS)
    with torch.no_grad():
        flow.bijection[0].log_scale.fill_(50.0)
    flow.bijection.layers.insert(2, Breaks("1e30"))
    found = only(flow, ROWS)
    assert (found.kind, found.layer) == ("not finite", "bijection.layers.2")
    assert "; most happens in bijection.layers.0 (ActNorm): values up to" in found.what


def test_the_layer_that_raises():
    flow = realnvp()
    flow.bijection.layers.insert(2, Breaks("raises"))
    found = only(flow, ROWS)
    assert (found.kind, found.layer) == ("raises", "bijection.layers.2")
    assert "bijection.layers.2 (Breaks) raises: a matrix is singular" in str(found)


@pytest.mark.parametrize(
    ("build", "x", "context", "message"),
    [
        (realnvp, ROWS[:, :3], None, r"x \[64, 3\] and no context do not fit this flow: expected x \[B, 4\]"),
        (realnvp, ROWS, torch.zeros(64, 1), r"a context \[64, 1\] do not fit .*: no layer of this flow uses a context"),
        (lambda: models.MAF(4, context=1), ROWS, None, r"no context do not fit this flow: .*: give it a context"),
        (lambda: models.MAF(4, context=1), ROWS, torch.zeros(64, 2), r"context \[64, 2\] .* takes a context \[B, 1\]"),
        (lambda: models.NSF(4, context=1), ROWS, torch.zeros(3, 1), "one entry per sample, got 3 for 64 samples"),
        (lambda: glow(classes=3), IMAGES, None, "no context do not fit this flow: .*give the labels"),
        (glow, IMAGES[:, :, :4], None, r"x \[64, 1, 4, 8\] .* \[B, 1, 8, 8\]"),
    ],
)
def test_what_does_not_fit_the_flow_is_no_symptom(build, x, context, message):
    with pytest.raises(ValueError, match=message):
        diagnose(build(), x, context)


def test_weights_and_data_that_are_not_finite():
    flow = realnvp()
    found = only(flow, torch.full((4, 4), torch.nan))
    assert found.kind == "data"
    (found,) = diagnose(models.MAF(4, layers=1, hidden=8, context=1), ROWS, torch.tensor([[torch.nan]]))
    assert (found.kind, found.what) == ("data", "the context is not finite")
    with torch.no_grad():
        flow.bijection[1].conditioner.first.weight[0, 0] = torch.inf
    found = only(flow, ROWS)
    assert (found.kind, found.layer) == ("weights", "bijection.layers.1.conditioner.first.weight")
