"""Training captured in a graph: the numbers of plain steps, for every optimiser, and the reason where it cannot be."""

import warnings

import pytest
import torch

from nfkernels.models import Glow
from nfkernels.nn import MLP, AffineCoupling, Bijection, Chain, Flow, StandardNormal
from nfkernels.nn.graph import CapturedPasses, CudaRecorder
from nfkernels.training import ImageData, fit
from nfkernels.training.optim import Optimizer
from nfkernels.training.recipe import OPTIMIZERS, Recipe
from nfkernels.training.step import LossModule, TrainStep

pytestmark = pytest.mark.gpu
RUN = {"batch_size": 16, "steps": 14, "validate_every": 5, "validation_draws": 2, "log_every": 3, "warmup": 3,
       "lr": 5e-3, "device": "cuda"}  # fmt: skip


def images(count, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 32, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageData(pixels, torch.arange(count) % 2, 32, ("even", "odd"), "noise")


def glow(*, classes=2):
    torch.manual_seed(0)
    return Glow((3, 8, 8), levels=2, steps=2, hidden=16, grey_levels=32, dropout=0.2, classes=classes)


def weights(flow):
    return {name: tensor.clone() for name, tensor in flow.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def recorded(monkeypatch):
    """How often something was recorded, with success."""
    counts, record = [], CudaRecorder.record

    def counted(self, function, generators):
        recording = record(self, function, generators)
        counts.append(recording)
        return recording

    monkeypatch.setattr(CudaRecorder, "record", counted)
    return counts


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_captured_run_is_the_uncaptured_one(tmp_path, recorded, optimizer, accumulate, precision):
    changes = {"optimizer": optimizer, "accumulate": accumulate, "precision": precision, "flip": True}
    flows = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without a CUDA graph")
        for captured in (False, True):
            flow = flows[captured] = glow()
            fit(flow, images(80), validation=images(40, seed=1), run=tmp_path / str(captured), cuda_graph=captured,
                **RUN | changes)  # fmt: skip
            assert len(recorded) == (2 if captured else 0)  # the step, and the pass of validation
    assert same(weights(flows[False]), weights(flows[True]))
    assert (tmp_path / "False/metrics.jsonl").read_bytes() == (tmp_path / "True/metrics.jsonl").read_bytes()


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, recorded):
    whole, halves, again = glow(), glow(), glow()
    fit(whole, images(80), run=tmp_path / "whole", **RUN)
    fit(halves, images(80), run=tmp_path / "halves", callback=lambda now: now.step == 8, **RUN)
    fit(again, images(80), run=tmp_path / "halves", resume=True, device="cuda")
    assert len(recorded) == 3
    assert same(weights(whole), weights(again))


class Waiting(Bijection):
    """The identity, waiting for the device: always, by reading a value, or only while it is captured."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x, context=None, *, lengths=None):
        if self.how == "reads":
            x.sum().item()
        elif torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        return x, x.new_zeros(x.shape[0])

    def inverse(self, z, context=None, *, lengths=None):
        return self(z)


@pytest.mark.parametrize(("how", "reason"), [("reads", "line .* waits for the device"), ("captured", "captur")])
def test_what_waits_for_the_device_is_told_and_trained_all_the_same(recorded, how, reason):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=generator)
    ends = []
    for captured in (False, True):
        torch.manual_seed(0)
        layers = [AffineCoupling(MLP(2, 16, 4, dropout=0.2), identity="first"), Waiting(how)]
        flow = Flow(Chain(layers), StandardNormal(4))
        if captured:
            with pytest.warns(UserWarning, match=f"the training step runs without a CUDA graph.*({reason})"):
                fit(flow, x, **RUN, cuda_graph=True)
        else:
            fit(flow, x, **RUN, cuda_graph=False)
        ends.append(weights(flow))
    assert not recorded
    assert same(*ends)
    # The device, its generators and its memory are none the worse for it.
    flow = glow()
    fit(flow, images(80), **RUN)
    assert len(recorded) == 1


def test_passes_are_captured(recorded):
    flow, data = glow().cuda(), images(24)
    pixels, labels = data.images.cuda(), data.labels.cuda()
    with torch.no_grad():
        flow.train()(pixels, labels)
    flow.eval()

    def results():
        draw = torch.Generator("cuda").manual_seed(0)
        with torch.no_grad():
            bits = flow.bits_per_dim(pixels, labels, draws=5, generator=draw)
            samples = flow.sample(12, torch.arange(2, device="cuda"), generator=draw, batch_size=4)
        return bits, samples

    plain = results()
    passes = CapturedPasses(flow, CudaRecorder(torch.device("cuda")))
    for _ in range(3):
        with passes:
            assert all(map(torch.equal, plain, results()))
    assert len(recorded) == 2
    with torch.no_grad():
        for p in flow.parameters():
            p.mul_(1.1)
    changed = results()
    with passes:
        assert all(map(torch.equal, changed, results()))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_never_waits_for_the_device(optimizer):
    flow, data = glow().cuda(), images(16)
    pixels, labels = data.images.cuda(), data.labels.cuda()
    with torch.no_grad():
        flow.train()(pixels, labels)
    adam = Optimizer(flow, Recipe(batch_size=16, optimizer=optimizer, accumulate=2, flip=True))
    noise = torch.Generator("cuda").manual_seed(0)
    step = TrainStep(LossModule(flow, "bfloat16"), adam, torch.zeros(3, device="cuda"), noise)
    for at in range(2):  # the first step makes states and loads kernels
        torch.cuda.set_sync_debug_mode("error" if at else "default")
        try:
            adam.prepare(at)
            step.run(pixels, labels)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert step.sums[2] == 2


def test_compile_graph_gives_the_flow_s_own_numbers(recorded):
    def made():
        torch.manual_seed(0)
        layers = [AffineCoupling(MLP(2, 16, 4), identity=side) for side in ("first", "second")]
        return Flow(Chain(*layers), StandardNormal(4)).cuda()

    plain, replayed = made(), made()
    batches = torch.randn(8, 32, 4, device="cuda")
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-2, capturable=True)
    fast = replayed.compile_graph(batches[0], optimizer=torch.optim.Adam(replayed.parameters(), lr=1e-2))
    for x in batches:
        optimizer.zero_grad()
        loss = plain.nll(x)
        loss.backward()
        optimizer.step()
        assert torch.equal(fast.step(x), loss.detach())
    plain.eval(), replayed.eval()
    fast = replayed.compile_graph(batches[0])
    assert torch.equal(fast.log_prob(batches[1]), plain.log_prob(batches[1]))
    torch.cuda.manual_seed(5)
    drawn = fast.sample(32)
    torch.cuda.manual_seed(5)
    assert torch.equal(drawn, plain.sample(32))
    assert len(recorded) == 3
