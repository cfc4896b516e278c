"""What users write, with the types a type checker must see in it: read by mypy in tests/test_typing.py, never run."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from typing_extensions import assert_type

import nfkernels
from nfkernels import MAF, NSF, Glow, RealNVP, ScaleMap, Spline, accelerate, affine_coupling, use_backend
from nfkernels.nn import (
    MLP,
    AffineCoupling,
    Bijection,
    Chain,
    Flow,
    LULinear,
    MaskedAutoregressive,
    ReversibleSequential,
    StandardNormal,
    drift,
)
from nfkernels.training import FitResult, ImageData, ImageStream, fit, load_images, split

x = torch.randn(8, 6)

# --- ops ---

y, logdet = affine_coupling(x, torch.zeros(8, 6), scale_map=ScaleMap("tanh", clamp=2.0), identity="first")
assert_type(y, Tensor)
assert_type(logdet, Tensor)
assert_type(nfkernels.channel_mix(x, torch.eye(6)), Tensor)
assert_type(nfkernels.lu_compose(torch.eye(3), torch.eye(3), torch.zeros(3)).logdet, Tensor)
assert_type(Spline.nflows(bins=8), Spline)
assert_type(nfkernels.__version__, str)
with use_backend("reference"):
    pass
affine_coupling(x, torch.zeros(8, 6), identity="third")  # type: ignore[arg-type]
affine_coupling(x)  # type: ignore[call-arg]

# --- layers and flows ---

layers = Chain(LULinear(6), AffineCoupling(MLP(3, 32, 6)), MaskedAutoregressive(6))
assert_type(layers[0], Bijection)
assert_type(layers[1:], Chain)
assert_type(layers(x), tuple[Tensor, Tensor])
assert_type(layers.inverse(x), tuple[Tensor, Tensor])
assert_type(layers.inv, Bijection)
assert_type(drift(ReversibleSequential(layers), x), dict[str, list[float]])

flow = Flow(layers, StandardNormal(6))
z, total = flow(x)
assert_type(z, Tensor)
assert_type(total, Tensor)
assert_type(flow.log_prob(x, batch_size=4), Tensor)
assert_type(flow.nll(x), Tensor)
assert_type(flow.sample(3, temperature=0.7), Tensor)
assert_type(flow.sample_and_log_prob(3), tuple[Tensor, Tensor])
assert_type(flow.check(x).ok, bool)
distribution: Distribution = flow.to_distribution()
flow.save("flow.safetensors")
assert_type(Flow.load("flow.safetensors"), Flow)
flow.sample("three")  # type: ignore[arg-type]
flow.log_prob()  # type: ignore[call-arg]

# --- models ---

nsf = NSF(6, layers=3, hidden=32)
assert_type(nsf.log_prob(x), Tensor)
assert_type(NSF.load("nsf.safetensors"), NSF)
posterior: Flow = MAF(2, layers=3, context=6)
tables: Flow = RealNVP(6)
images = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
glow = Glow((3, 16, 16), levels=2, steps=4, hidden=32)
assert_type(glow.bits_per_dim(images, draws=2), Tensor)
assert_type(glow.sample(2), Tensor)
fast = glow.compile_graph(images, optimizer=torch.optim.Adam(glow.parameters()))
assert_type(fast.step(images), Tensor)

# --- training ---

data = load_images("photos")
train, validation, test = split(data, seed=0)
assert_type(train, ImageData | ImageStream)
assert_type(split(load_images("photos", stream=False), seed=0)[0], ImageData)
assert_type(load_images("digits"), ImageData)
result = fit(glow, train, validation=validation, steps=20)
assert_type(result, FitResult)
fit(glow, train, stesp=3)  # type: ignore[call-arg]
fit(glow, train, steps="3")  # type: ignore[arg-type]

# --- somebody else's flow ---

model: nn.Module = nn.Sequential()
report = accelerate(model, x)
assert_type(report.fused, "list[nfkernels.integrations.Row]")
assert_type(nfkernels.restore(model), int)


# --- a layer of one's own ---


class Double(Bijection):
    def forward(
        self, x: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return 2 * x, x.new_full((x.shape[0],), x[0].numel() * 0.6931)

    def inverse(
        self, z: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return z / 2, z.new_full((z.shape[0],), z[0].numel() * -0.6931)


assert_type(Chain(Double(), Double().inv)(x), tuple[Tensor, Tensor])


def first(data: ImageData) -> Tensor:
    return data.images[0]
