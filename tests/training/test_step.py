"""The step: parts of a batch, flips, precision, and no waiting for the device."""

import contextlib
import dataclasses
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from tiny import QUICK, glow, stripes, tabular
from torch.utils._python_dispatch import TorchDispatchMode

from nfkernels.models import Glow
from nfkernels.training import ImageData, Recipe, TrainingError, fit, optim
from nfkernels.training.optim import Optimizer
from nfkernels.training.recipe import OPTIMIZERS
from nfkernels.training.step import LossModule, TrainStep, check_recipe, mirrored


def train_step(flow, generator=None, **changes):
    recipe = Recipe(**{"batch_size": 8, "steps": 20, "lr": 0.02, "warmup": 0} | changes)
    optimizer = Optimizer(flow, recipe)
    sums = torch.zeros(3, device=optimizer.parameters[0].device)
    return TrainStep(LossModule(flow, recipe.precision), optimizer, sums, generator)


def weights(flow):
    return [p.detach().clone() for p in flow.parameters()]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_batch_in_parts_gives_the_step_of_the_whole(optimizer):
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(8, 2, generator=generator, dtype=torch.float64) for _ in range(4)]
    ends = []
    for accumulate in (1, 2, 4):
        flow = tabular().double()
        step = train_step(flow, accumulate=accumulate, optimizer=optimizer, clip=1.0)
        for at, batch in enumerate(data):
            step.optimizer.prepare(at)
            step.run(batch)
        ends.append((weights(flow), step.sums))
    for parts, sums in ends[1:]:
        for whole, p in zip(ends[0][0], parts, strict=True):
            torch.testing.assert_close(p, whole, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(sums, ends[0][1], rtol=1e-6, atol=0)
        assert sums[2] == 4


def test_parts_of_a_batch_have_their_own_context_and_need_less_memory():
    flow, data = glow(classes=2), stripes(12, labels=True)
    flow(data.images, data.labels)
    most = {}
    for accumulate in (1, 4):
        saved, sizes = [], []

        def keep(tensor, saved=saved):
            saved.append(tensor.numel() if tensor.shape[:1] in ((12,), (3,)) else 0)  # of samples, not of weights
            return tensor

        def count(*_, saved=saved, sizes=sizes):
            sizes.append(sum(saved))
            saved.clear()

        step = train_step(flow, accumulate=accumulate, batch_size=12)
        step.loss.register_forward_hook(count)
        step.optimizer.prepare(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            step.run(data.images, data.labels)
        assert len(sizes) == accumulate
        most[accumulate] = max(sizes)
    assert 0 < most[4] <= most[1] / 4
    seen = []
    flow.embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    step.run(data.images, data.labels)
    assert len(seen) == 4
    assert torch.equal(torch.cat(seen), data.labels)


class Spoilt(torch.nn.Module):
    """A loss module of which chosen calls are not finite, in value only or in the gradient as well."""

    def __init__(self, loss, calls, factor):
        super().__init__()
        self.loss, self.calls, self.factor, self.count = loss, calls, factor, 0

    def forward(self, samples, context=None, noise=None):
        loss = self.loss(samples, context, noise)
        self.count += 1
        return loss * self.factor if self.count - 1 in self.calls else loss


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", [0, 1])
def test_one_bad_part_skips_the_whole_step(optimizer, factor, part):
    flow = tabular()
    step = train_step(flow, accumulate=2, optimizer=optimizer)
    step.loss = Spoilt(step.loss, {2 + part}, factor)
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    seen = []
    for at in range(3):
        step.optimizer.prepare(at)
        step.run(x)
        seen.append((weights(flow), {k: v.clone() for k, v in step.optimizer.state_dict().items()}, step.sums.clone()))
    (first, state, sums), (second, state2, sums2), (third, _, sums3) = seen
    assert all(map(torch.equal, first, second))
    assert all(torch.equal(state[key], state2[key]) for key in state if key.startswith("adam."))
    assert torch.equal(sums, sums2)
    assert not all(map(torch.equal, second, third))
    assert torch.isfinite(sums3).all()
    assert (sums3[2], step.optimizer.skipped) == (2, 1)


def test_gradients_are_exchanged_in_the_last_part_only():
    events = []

    class Wrapped(torch.nn.Module):
        def __init__(self, loss):
            super().__init__()
            self.loss = loss

        @contextlib.contextmanager
        def no_sync(self):
            events.append("no_sync")
            yield
            events.append("end")

        def forward(self, *args):
            events.append("loss")
            return self.loss(*args)

    flow = tabular()
    step = train_step(flow, accumulate=3, batch_size=9)
    step.loss = Wrapped(step.loss)
    step._ranks = SimpleNamespace(rank=0, world=1, mean_=lambda loss: events.append(float(loss)))
    step.optimizer.prepare(0)
    x = torch.randn(9, 2)
    step.run(x)
    assert events[:-1] == ["no_sync", "loss", "end"] * 2 + ["loss"]
    assert events[-1] == pytest.approx(float(step.sums[0]))


def test_flips_mirror_about_half_and_nothing_else():
    images = torch.arange(400 * 12, dtype=torch.int32).remainder(251).to(torch.uint8).view(400, 1, 3, 4)
    out = mirrored(images, torch.Generator().manual_seed(0))
    same = (out == images).flatten(1).all(1)
    turned = (out == images.flip(-1)).flatten(1).all(1)
    assert (same ^ turned).all()
    assert 160 < int(turned.sum()) < 240
    assert torch.equal(mirrored(images, torch.Generator().manual_seed(0)), out)
    assert not torch.equal(mirrored(images, torch.Generator().manual_seed(1)), out)


def test_flipped_training_sees_both_sides_of_an_image():
    flow, seen = glow(dropout=0.0), Counter()
    image = torch.arange(16, dtype=torch.uint8).remainder(5).view(1, 1, 4, 4)
    noise = flow.noise

    def watched(images, **options):
        for row in images[:, 0, 0]:
            seen[tuple(row.tolist())] += 1
        return noise(images, **options)

    flow.noise = watched
    fit(flow, ImageData(image.expand(8, 1, 4, 4).clone(), None, 5, None, "one"), steps=10, flip=True, **QUICK)
    assert seen.keys() == {(0, 1, 2, 3), (3, 2, 1, 0)}
    assert 20 < seen[3, 2, 1, 0] < 60  # of 80, and eight more before the first step


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resumes_bit_for_bit_with_flips_and_parts(tmp_path, optimizer):
    options = QUICK | {"optimizer": optimizer, "flip": True, "accumulate": 2, "schedule": "exponential", "steps": 10}
    whole, halves = glow(), glow()
    fit(whole, stripes(24), validation=stripes(8, seed=1), run=tmp_path / "whole", **options)
    fit(halves, stripes(24), validation=stripes(8, seed=1), run=tmp_path / "halves", callback=lambda now: now.step == 4,
        **options)  # fmt: skip
    again = glow(seed=5)
    fit(again, stripes(24), validation=stripes(8, seed=1), run=tmp_path / "halves", resume=True)
    assert all(map(torch.equal, weights(whole), weights(again)))
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "halves/metrics.jsonl").read_bytes()
    other = "adam" if optimizer != "adam" else "adamax"
    with pytest.raises(TrainingError, match="optimizer"):
        fit(glow(), stripes(24), run=tmp_path / "halves", resume=True, optimizer=other)


def test_bfloat16_reaches_the_networks_and_leaves_the_rest_alone():
    flow = glow(dropout=0.0)
    data = stripes(8)
    result = fit(flow, stripes(32), validation=data, steps=5, precision="bfloat16", **QUICK)
    assert result.history[-1]["step"] == 5
    assert all(p.dtype == torch.float32 for p in flow.parameters())
    losses, kinds = {}, set()

    class Kinds(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                kinds.add(out.dtype)
            return out

    for precision in ("float32", "bfloat16"):
        loss = LossModule(flow, precision)
        with Kinds():
            noise = flow.noise(data.images, generator=torch.Generator().manual_seed(0))
            losses[precision] = loss(data.images, None, noise)
        assert losses[precision].dtype == torch.float32
        assert torch.float32 in kinds
        assert (torch.bfloat16 in kinds) == (precision == "bfloat16")
        kinds.clear()
    assert losses["bfloat16"] != losses["float32"]
    assert float(losses["bfloat16"].detach()) == pytest.approx(float(losses["float32"].detach()), abs=0.05)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_reads_a_value_on_the_host(optimizer, accumulate, monkeypatch):
    """On tensors without values, taken for a GPU's: reading one is an error. Flips, noise and counters included."""
    monkeypatch.setattr(optim, "_CAPTURING_DEVICES", ("meta",))
    monkeypatch.setattr(optim, "_FUSED_DEVICES", ("meta",))
    listed = {"adamax": "capturable_supported", "optimizer": "fused_kernels_supported"}
    for module, what in listed.items():  # torch.optim has no attributes of these names
        monkeypatch.setattr(sys.modules[f"torch.optim.{module}"], f"_get_{what}_devices", lambda **_: ["meta"])
    monkeypatch.setattr("torch.utils._foreach_utils._get_foreach_kernels_supported_devices", lambda: ["meta"])
    fused = []  # the fused optimisers have no fake: what they are told is looked at

    def kernel(*tensors, lr, found_inf, **_):
        fused.append(len(tensors[0]))
        assert lr.is_meta
        assert found_inf.is_meta

    for name in ("_fused_adam_", "_fused_adamw_"):
        monkeypatch.setattr(torch, name, kernel)
    with torch.device("meta"):
        flow = Glow((1, 4, 4), levels=1, steps=2, hidden=8, grey_levels=5, dropout=0.2)
        for module in flow.modules():
            if hasattr(module, "_started"):
                module._started = True
        step = train_step(flow, accumulate=accumulate, optimizer=optimizer, flip=True, clip=1.0)
        assert step.optimizer.capturable
        images = torch.zeros(8, 1, 4, 4, dtype=torch.uint8)
        for at in range(2):
            step.optimizer.prepare(at)
            step.run(images)
        assert sum(fused) == (0 if optimizer == "adamax" else 2 * len(step.optimizer.parameters))
        for value in step.optimizer.state_dict().values():
            assert value.is_meta  # step counts and moments too
        with pytest.raises(RuntimeError, match="item"):
            float(step.sums[0])


def test_what_cannot_be_trained_so_is_told_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match="flip mirrors images, and this flow is none"):
        fit(tabular(), torch.zeros(8, 2), flip=True, run=tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"5 samples \(there are no more samples; batch_size is 8\) does not split evenly"
    ):
        fit(glow(), stripes(5), batch_size=8, accumulate=2, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    check_recipe(Recipe(batch_size=8, accumulate=2), tabular(), 100, ranks=4)
    with pytest.raises(ValueError, match=r"a batch of 8 samples does not split evenly into 2 parts on each of 3 ranks"):
        check_recipe(Recipe(batch_size=8, accumulate=2), tabular(), 100, ranks=3)
    with pytest.raises(ValueError, match=r"a batch of 15 samples does not split evenly among 2 ranks: change"):
        check_recipe(Recipe(batch_size=15), tabular(), 100, ranks=2)
    step = train_step(tabular(), accumulate=2)
    with pytest.raises(ValueError, match="a batch of 7 samples does not split into accumulate = 2 equal parts"):
        step.run(torch.zeros(7, 2))


def test_recipes_of_before_train_as_they_did():
    """The defaults of the newer fields, given or not, are one and the same run."""
    plain, told = glow(), glow()
    fit(plain, stripes(16), steps=6, **QUICK)
    newer = {"optimizer": "adamw", "accumulate": 1, "precision": "float32", "flip": False, "lr_end": 0.0}
    fit(told, stripes(16), recipe=dataclasses.replace(Recipe(), **newer), steps=6, **QUICK)
    assert all(map(torch.equal, weights(plain), weights(told)))
